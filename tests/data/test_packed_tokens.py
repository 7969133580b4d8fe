import pytest
import torch

from hf_pdprune.data import pack_tokens, tokenize_rows


def test_rows_are_joined_and_cut_into_equal_ones():
    batches = pack_tokens([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 100, max_row_tokens=4)
    assert [sorted(batch.tolist()) for batch in batches] == [[[1, 2, 3, 4], [5, 6, 7, 8]]]


def test_rows_are_mixed_and_always_alike():
    first, again = (torch.cat(pack_tokens([list(range(100))], 100, max_row_tokens=2)) for _ in range(2))
    assert torch.equal(first, again) and first[:, 0].tolist() != sorted(first[:, 0].tolist())
    assert sorted(first.flatten().tolist()) == list(range(100))


def test_no_more_is_read_than_needed():
    read = []
    rows = (read.append(n) or [n] * 10 for n in range(100))
    assert sorted(torch.cat(pack_tokens(rows, 25, max_row_tokens=5)).tolist()) == [
        [0] * 5,
        [0] * 5,
        [1] * 5,
        [1] * 5,
        [2] * 5,
    ]
    assert read == [0, 1, 2]


def test_rows_and_batches_are_bounded():
    batches = pack_tokens([[1] * 10_000], 10_000)
    assert [tuple(batch.shape) for batch in batches] == [(8, 512), (8, 512), (3, 512)]
    assert [tuple(batch.shape) for batch in pack_tokens([[1] * 100], 1000)] == [(1, 100)]


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        pack_tokens([], 100)


def test_every_kind_of_row_gives_its_text(tiny_tokenizer):
    rows = [
        {"text": "one"},
        {"prompt": "two ", "completion": "three"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "five"}]},
    ]
    texts = [tiny_tokenizer.decode(tokens) for tokens in tokenize_rows(rows, tiny_tokenizer)]
    assert texts == [
        "one\n\n",
        "two three\n\n",
        "<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\nfive<|im_end|>\n",
    ]
