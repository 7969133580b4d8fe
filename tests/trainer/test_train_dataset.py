import pytest
import torch
from datasets import Dataset


def test_plain_text_and_prompt_completion_rows(tiny_model, make_trainer, losses):
    text = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog " * 3}] * 4)
    pairs = Dataset.from_list([{"prompt": "the quick brown", "completion": " fox jumps"}] * 4)
    for rows in (text, pairs):
        trainer = make_trainer(tiny_model("llama"), train_dataset=rows, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] > 0
    packed = make_trainer(
        tiny_model("llama"),
        train_dataset=text,
        packing=True,
        packing_strategy="wrapped",
        max_length=32,
    )
    assert {len(row["input_ids"]) for row in packed.train_dataset} <= {32} | set(range(2, 32))


@pytest.mark.parametrize("streamed", [False, True])
def test_joined_rows_without_a_completion_token_are_left_out(tiny_llama, make_trainer, losses, streamed):
    pairs = Dataset.from_list([{"prompt": "the quick brown fox jumps over", "completion": " it"}] * 9)
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "local_distillation_tokens": 64}
    data = pairs.to_iterable_dataset() if streamed else pairs
    trainer = make_trainer(tiny_llama, train_dataset=data, eval_dataset=pairs, max_steps=2, **options)
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        labels = [row["labels"] for row in dataset]
        assert 0 < len(labels) < 20 and all(len(row) > 1 and max(row) != -100 for row in labels)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_rows_of_other_columns_are_formatted(tiny_llama, make_trainer, tiny_tokenizer, losses):
    rows = Dataset.from_list([{"question": f"why {n}", "answer": f"because of {n}"} for n in range(4)])
    trainer = make_trainer(
        tiny_llama,
        train_dataset=rows,
        formatting_func=lambda row: f"Q: {row['question']}? A: {row['answer']}.",
        max_steps=1,
    )
    texts = [tiny_tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts[3] == "Q: why 3? A: because of 3.<|im_end|>"
    trainer.train()
    assert losses(trainer)[0] > 0


@pytest.mark.parametrize("max_length", [None, 100000])
def test_rows_are_cut_to_the_context(tiny_model, make_trainer, max_length, caplog):
    model = tiny_model("llama", max_position_embeddings=32)
    rows = Dataset.from_list([{"input_ids": list(range(3, 80))}] * 2)
    trainer = make_trainer(model, train_dataset=rows, max_length=max_length)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [32, 32]
    message = "2 of 2 rows are longer than max_length=32 (the longest has 77 tokens) and are cut"
    assert caplog.text.count(f"train_dataset: {message}") == caplog.text.count(f"eval_dataset: {message}") == 1


def chat(n):
    roles = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": f"answer {n}"}]
    return {"messages": roles + [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no more"}]}


def test_messages_with_assistant_only_loss(tiny_llama, make_trainer, tiny_tokenizer, losses):
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    data = Dataset.from_list([chat(n) for n in range(4)])
    trainer = make_trainer(tiny_llama, train_dataset=data, assistant_only_loss=True, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    said = tiny_tokenizer.decode(batch["completion_ids"][0][batch["labels"][0] != -100])
    assert said.startswith("answer") and said.endswith("no more<|im_end|>") and "and?" not in said
    assert "and?" in tiny_tokenizer.decode(batch["completion_ids"][0])
    trainer.train()
    assert losses(trainer)[0] > 0


def test_rows_whose_prompt_fills_max_length_are_counted(tiny_llama, make_trainer, tiny_tokenizer, caplog):
    rows = [{"prompt": "a" * n, "completion": "b" * 4} for n in (5, 50, 7, 60)]
    trainer = make_trainer(tiny_llama, train_dataset=Dataset.from_list(rows), max_length=16)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [10, 12]
    assert "train_dataset: 2 of 4 rows are longer than max_length=16 (the longest has 65" in caplog.text
    assert "2 of them have a prompt of that length and are left out" in caplog.text
    caplog.clear()
    trainer.evaluate(Dataset.from_list(rows))
    assert "eval_dataset: 2 of 4 rows" in caplog.text


def test_streaming(tiny_llama, make_trainer, rows, losses):
    trainer = make_trainer(tiny_llama, train_dataset=rows.to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_the_first_rows_of_a_stream_are_checked(tiny_llama, make_trainer, rows):
    bad = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}])
    with pytest.raises(ValueError, match="train_dataset: row 1 has 1 token"):
        make_trainer(tiny_llama, train_dataset=bad.to_iterable_dataset(), eval_dataset=rows)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": [5, 6, 7]}], "has 1 row"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}] * 3, "row 0 has no completion token"),
    ],
)
def test_bad_data_is_an_error_before_training(tiny_llama, make_trainer, data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_llama, train_dataset=Dataset.from_list(data))


def test_padding_changes_nothing(tiny_llama, make_trainer):
    generator = torch.Generator().manual_seed(1)
    data = [
        {
            "input_ids": (ids := torch.randint(3, 240, (n,), generator=generator).tolist()),
            "labels": [-100] * p + ids[p:],
        }
        for n, p in ((24, 16), (9, 2), (30, 29), (14, 12))
    ]
    trainer = make_trainer(tiny_llama, train_dataset=Dataset.from_list(data))
    together = trainer.compute_loss(trainer.model, trainer.data_collator(data), num_items_in_batch=1)
    alone = sum(trainer.compute_loss(trainer.model, trainer.data_collator([r]), num_items_in_batch=1) for r in data)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
