import pytest
import torch
import torch.nn.functional as F

from hf_pdprune.inference import dense_forward
from hf_pdprune.search import Calibration
from hf_pdprune.search.calibration import Teacher


def test_every_example_is_there_once_with_its_tokens_counted(tiny_llama, examples):
    rows = examples(count=7)
    data = Calibration(tiny_llama, rows, pad_token_id=0, batch_size=3)
    seen = []
    for batch in data.batches:
        for row in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            seen.append([*prompt.tolist(), *completion.tolist()])
    assert sorted(seen) == sorted(row["input_ids"] for row in rows)
    assert data.num_completion_tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert data.num_prompt_tokens == sum(label == -100 for row in rows for label in row["labels"])
    assert (len(data), data.num_examples) == (3, 7)


def test_batches_are_of_about_equal_length(tiny_llama, examples):
    data = Calibration(tiny_llama, examples(count=24, prompt_tokens=(5, 100)), pad_token_id=0, batch_size=4)
    padded = sum(batch["prompt_ids"].numel() for batch in data.batches)
    assert padded < 1.2 * data.num_prompt_tokens


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@torch.no_grad()
def test_the_teacher_is_the_dense_model(tiny_llama, calibration, first_token):
    data = calibration(tiny_llama, first_token=first_token)
    plain = calibration(tiny_llama)
    assert data.num_completion_tokens == plain.num_completion_tokens
    assert (data.digest == plain.digest) == (first_token == "prefill")
    for index in range(len(data)):
        batch = data[index]
        logits = dense_forward(tiny_llama, batch.tensors)
        assert batch.kl_of_first(logits[:, 0]) + batch.kl_of_rest(logits[:, 1:]) == pytest.approx(0, abs=1e-4)
        other = torch.randn_like(logits)
        kl = F.kl_div(other.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        expected = kl[batch.tensors["labels"] != -100].sum().item()
        assert batch.kl_of_first(other[:, 0]) + batch.kl_of_rest(other[:, 1:]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_teacher_is_still_a_distribution(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(50, 1000, generator=generator)
    teacher = Teacher.from_logits(logits, dtype)
    normalised = teacher.probabilities.double() / teacher.probabilities.double().sum(-1, keepdim=True)
    # KL of the rounded distribution to itself is nothing, and to any other positive.
    assert teacher.kl_sum(normalised.log().clamp(min=-1e4).float()) == pytest.approx(0, abs=1e-3)
    expected = F.kl_div(torch.full_like(logits, 1e-3).log(), logits.log_softmax(-1), reduction="sum", log_target=True)
    assert teacher.kl_sum(torch.zeros_like(logits)) == pytest.approx(expected.item(), rel=1e-2)
    assert teacher.nbytes == 50 * 1000 * dtype.itemsize + 2 * 50 * 4


def test_memory_is_stated(tiny_llama, calibration):
    full, half = calibration(tiny_llama), calibration(tiny_llama, teacher_dtype=torch.bfloat16)
    assert full.nbytes == full.num_completion_tokens * (256 + 2) * 4
    assert half.nbytes == half.num_completion_tokens * (256 * 2 + 2 * 4)
    assert full.digest != half.digest
    assert full.round_digest == full.digest  # names the journals of one process


def test_from_rows_of_text(tiny_llama, tiny_tokenizer):
    rows = [{"text": "Prefill reads the prompt, decode writes the answer. " * 8}]
    data = Calibration.from_rows(tiny_llama, tiny_tokenizer, rows, 30, 20, max_examples=5, batch_size=2)
    assert (data.num_examples, data.num_prompt_tokens, data.num_completion_tokens) == (5, 150, 100)


def test_bad_sets(tiny_model, tiny_llama, examples):
    with pytest.raises(ValueError, match="has no example"):
        Calibration(tiny_llama, [], 0)
    with pytest.raises(ValueError, match="at least 64"):
        Calibration(tiny_llama, examples(count=1), 0)
    with pytest.raises(ValueError, match="context is 512"):
        Calibration(tiny_llama, examples(prompt_tokens=(510, 511)), 0)
    with pytest.raises(ValueError, match="batch_size must be"):
        Calibration(tiny_llama, examples(), 0, batch_size=0)
    broken = tiny_model("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="hold NaN"):
        Calibration(broken, examples(), 0)
