import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_pdprune.data import PromptCompletionCollator, prompt_completion, tokenize_examples


TOKENS = st.lists(st.integers(3, 255), min_size=2, max_size=20)


@st.composite
def labelled_rows(draw):
    """A row of a prompt and a completion, some of whose later tokens may be without loss."""
    tokens = draw(TOKENS)
    cut = draw(st.integers(1, len(tokens) - 1))
    labels = [-100] * cut + [token if draw(st.booleans()) else -100 for token in tokens[cut:]]
    labels[cut] = tokens[cut]
    return {"input_ids": tokens, "labels": labels}, cut


class TestCollator:
    @given(st.lists(labelled_rows(), min_size=1, max_size=4))
    def test_nothing_is_lost_and_nothing_added(self, rows_and_cuts):
        rows, cuts = zip(*rows_and_cuts, strict=True)
        batch = PromptCompletionCollator(pad_token_id=0)(rows)
        widths = max(cuts), max(len(row["input_ids"]) - cut for row, cut in rows_and_cuts)
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "prompt_ids": (len(rows), widths[0]),
            "prompt_mask": (len(rows), widths[0]),
            "completion_ids": (len(rows), widths[1]),
            "completion_mask": (len(rows), widths[1]),
            "labels": (len(rows), widths[1]),
        }
        assert all(tensor.dtype == torch.long for tensor in batch.values())
        for index, (row, cut) in enumerate(rows_and_cuts):
            prompt, completion = row["input_ids"][:cut], row["input_ids"][cut:]
            empty = widths[0] - cut, widths[1] - len(completion)
            # Prompts end where completions begin.
            assert batch["prompt_ids"][index].tolist() == [0] * empty[0] + prompt
            assert batch["prompt_mask"][index].tolist() == [0] * empty[0] + [1] * cut
            assert batch["completion_ids"][index].tolist() == completion + [0] * empty[1]
            assert batch["completion_mask"][index].tolist() == [1] * len(completion) + [0] * empty[1]
            assert batch["labels"][index].tolist() == row["labels"][cut:] + [-100] * empty[1]

    @given(TOKENS, st.integers(0, 3), st.booleans())
    def test_plain_text_is_cut_in_its_middle(self, tokens, seed, has_labels):
        row = {"input_ids": tokens} | ({"labels": tokens} if has_labels else {})
        batch = PromptCompletionCollator(pad_token_id=0, seed=seed)([row])
        cut = batch["prompt_ids"].shape[1]
        assert batch["prompt_ids"][0].tolist() + batch["completion_ids"][0].tolist() == tokens
        assert torch.equal(batch["labels"], batch["completion_ids"])
        assert max(1, round(len(tokens) / 4)) <= cut <= min(round(len(tokens) * 3 / 4), len(tokens) - 1)

    def test_a_row_is_always_cut_at_the_same_place(self):
        generator = torch.Generator().manual_seed(0)
        rows = [{"input_ids": torch.randint(256, (80,), generator=generator).tolist()} for _ in range(50)]

        def cuts(rows, seed=0):
            collator = PromptCompletionCollator(pad_token_id=0, seed=seed)
            return [int(mask.sum()) for mask in collator(rows)["prompt_mask"]]

        first = cuts(rows)
        assert cuts(rows) == [cuts([row])[0] for row in rows] == list(reversed(cuts(rows[::-1]))) == first
        # They are spread over the middle half, and another seed spreads them otherwise.
        assert len(set(first)) > 15
        assert min(first) < 27
        assert max(first) > 53
        assert cuts(rows, seed=1) != first

    def test_decode_reads_the_last_prompt_token_where_the_first_one_is_left_to_it(self):
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10, 11, 12, 13]}]
        plain, left = (PromptCompletionCollator(0, first_token=stage)(rows) for stage in ("prefill", "decode"))
        for name in ("ids", "mask"):
            assert torch.equal(left[f"prompt_{name}"], plain[f"prompt_{name}"][:, :-1])
            moved = torch.cat([plain[f"prompt_{name}"][:, -1:], plain[f"completion_{name}"]], dim=1)
            assert torch.equal(left[f"completion_{name}"], moved)
        assert torch.equal(left["labels"][:, 1:], plain["labels"]) and (left["labels"][:, 0] == -100).all()
        one = {"input_ids": [5, 6], "labels": [-100, 6]}  # prefill has to read something
        mixed = PromptCompletionCollator(0, first_token="decode")([one, rows[0]])
        assert mixed["prompt_mask"].sum() == 2 and mixed["prompt_ids"][:, -1].tolist() == [5, 5]
        assert mixed["completion_ids"].tolist() == [[6, 0, 0], [6, 7, 8]]
        assert mixed["labels"].tolist() == [[6, -100, -100], [-100, 7, 8]]
        with pytest.raises(ValueError, match="first_token must be prefill or decode, got 'both'"):
            PromptCompletionCollator(0, first_token="both")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"input_ids": [5, 6], "labels": [-100, -100]}, "no completion token"),
            ({"input_ids": [5]}, "one token cannot be cut"),
            ({"input_ids": []}, "no completion token"),
        ],
        ids=str,
    )
    def test_rows_without_prompt_or_completion(self, row, message):
        with pytest.raises(ValueError, match=message):
            PromptCompletionCollator(pad_token_id=0)([{"input_ids": [5, 6]}, row])


class TestTokenizeExamples:
    def test_text_is_joined_and_cut_into_equal_pieces(self, tiny_tokenizer):
        rows = [{"text": text} for text in ("a" * 10, "b" * 3, "", "c" * 25)]
        examples = tokenize_examples(rows, tiny_tokenizer, prompt_tokens=9, completion_tokens=5)
        text = "a" * 10 + "\n\n" + "b" * 3 + "\n\n" + "\n\n" + "c" * 25 + "\n\n"
        assert len(examples) == len(text) // 14 == 3
        joined = [token for example in examples for token in example["input_ids"]]
        assert tiny_tokenizer.decode(joined) == text[: 3 * 14]
        for example in examples:
            assert example["labels"] == [-100] * 9 + example["input_ids"][9:]

    def test_prompts_lose_their_beginning_and_completions_their_end(self, tiny_tokenizer):
        rows = [
            {"prompt": "What is the capital of France?", "completion": " Paris, of course."},
            {"prompt": "Hm?", "completion": "!"},
            {"prompt": "", "completion": "!"},
            {"prompt": "Hm?", "completion": ""},
        ]
        examples = tokenize_examples(rows, tiny_tokenizer, prompt_tokens=7, completion_tokens=6)
        texts = []
        for example in examples:
            cut = example["labels"].count(-100)
            assert example["labels"][cut:] == example["input_ids"][cut:]
            texts.append(
                tuple(tiny_tokenizer.decode(part) for part in (example["input_ids"][:cut], example["input_ids"][cut:]))
            )
        assert texts == [("France?", " Paris"), ("Hm?", "!")]

    def test_chats_use_the_template(self, tiny_tokenizer):
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
        (example,) = tokenize_examples([{"messages": chat}], tiny_tokenizer, 100, 100)
        cut = example["labels"].count(-100)
        assert tiny_tokenizer.decode(example["input_ids"][:cut]) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tiny_tokenizer.decode(example["input_ids"][cut:]) == "Hello<|im_end|>"

    @pytest.mark.parametrize("most", [1, 2, 3, 100])
    def test_max_examples(self, tiny_tokenizer, most):
        def rows():
            for _ in range(4):
                yield {"text": "x" * 26}  # 28 with the paragraph's end: two examples
            if most < 100:
                pytest.fail("more rows were read than needed")

        examples = tokenize_examples(rows(), tiny_tokenizer, 10, 4, max_examples=most)
        assert len(examples) == min(most, 8)

    def test_too_little_text(self, tiny_tokenizer):
        message = r"no example of 10 prompt and 4 completion tokens \(12 tokens in all\)"
        with pytest.raises(ValueError, match=message):
            tokenize_examples([{"text": "x" * 10}], tiny_tokenizer, 10, 4)
        with pytest.raises(ValueError, match="no example"):
            tokenize_examples([], tiny_tokenizer, 10, 4)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "max_examples"])
def test_numbers_below_one_are_refused(tiny_tokenizer, name, number):
    numbers = {"prompt_tokens": 4, "completion_tokens": 2, "max_examples": 3} | {name: number}
    for row in ({"text": "a text that is long enough"}, {"prompt": "a question", "completion": " its answer"}):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {number}$"):
            tokenize_examples([row], tiny_tokenizer, **numbers)


def test_of_a_long_text_no_more_is_cut_than_wanted(tiny_tokenizer, monkeypatch):
    text = [{"text": "a text as long as a book"}] * 3 + [{"text": "a text as long as a book" * 100}]
    every = tokenize_examples(text, tiny_tokenizer, 6, 2)
    assert len(every) == (3 * 26 + 24 * 100 + 2) // 8
    made = []
    monkeypatch.setattr(prompt_completion, "_example", lambda *parts: made.append(parts))
    tokenize_examples(text, tiny_tokenizer, 6, 2, max_examples=11)
    assert [[*prompt, *completion] for prompt, completion in made] == [row["input_ids"] for row in every[:11]]


def test_widths_are_padded_to_a_multiple_on_the_outer_sides():
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]
    batch = PromptCompletionCollator(0, pad_to_multiple_of=4)(rows)
    assert batch["prompt_ids"].tolist() == [[0, 5, 6, 7]] and batch["prompt_mask"].tolist() == [[0, 1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[8, 9, 0, 0]] and batch["completion_mask"].tolist() == [[1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 9, -100, -100]]
