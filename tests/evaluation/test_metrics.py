import math
from concurrent.futures import ThreadPoolExecutor

import evaluate
import pytest
import torch

from hf_pdprune.evaluation.metrics import KLToDense, Perplexity, Top1Agreement


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    logits, dense = (3 * torch.randn((7, 11), generator=generator) for _ in range(2))
    labels = torch.randint(11, (7,), generator=generator)
    dense[2] = logits[2] + 5  # the same distribution
    return logits, dense, labels, ["prefill"] * 2 + ["decode"] * 5


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_values_and_stages(tokens):
    logits, dense, labels, stages = tokens
    p, q = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    nll, kl = -p[range(7), labels], (q.exp() * (q - p)).sum(-1)
    agrees = (p.argmax(-1) == q.argmax(-1)).double()

    found = Perplexity().compute(predictions=logits, references=labels, stages=stages)
    expected = {"perplexity": nll, "perplexity_prefill": nll[:2], "perplexity_decode": nll[2:]}
    assert found == pytest.approx({name: math.exp(part.mean()) for name, part in expected.items()}, rel=1e-5)

    found = KLToDense().compute(predictions=logits, references=dense, stages=stages)
    expected = {"kl": kl, "kl_prefill": kl[:2], "kl_decode": kl[2:]}
    assert found == pytest.approx({name: part.mean().item() for name, part in expected.items()}, rel=1e-5)

    found = Top1Agreement().compute(predictions=logits, references=dense)
    assert found == {"top1_agreement": pytest.approx(agrees.mean().item())} and 0 < agrees.mean() < 1


def test_batches_add_up_and_a_metric_can_be_used_again(tokens):
    logits, dense, labels, stages = tokens
    for metric, references in ((Perplexity(), labels), (KLToDense(keep_in_memory=True), dense)):
        whole = metric.compute(predictions=logits, references=references, stages=stages)
        for rows in (slice(0, 3), slice(3, 7)):
            metric.add_batch(predictions=logits[rows], references=references[rows], stages=stages[rows])
        assert metric.compute() == pytest.approx(whole)


def test_processes_are_gathered(tokens, tmp_path):
    logits, dense, _, stages = tokens
    rows = (slice(0, 3), slice(3, 7))

    def share(process):  # each waits for the other one
        options = {"num_process": 2, "experiment_id": "test", "cache_dir": str(tmp_path), "timeout": 60}
        metric = KLToDense(process_id=process, **options)
        part = rows[process]
        metric.add_batch(predictions=logits[part], references=dense[part], stages=stages[part])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(share, (0, 1)))
    whole = KLToDense().compute(predictions=logits, references=dense, stages=stages)
    assert results == [pytest.approx(whole), None]


def test_arrays_and_lists_are_taken(tokens):
    logits, _, labels, _ = tokens
    as_tensors = Perplexity().compute(predictions=logits, references=labels)
    assert Perplexity().compute(predictions=logits.numpy(), references=labels.tolist()) == as_tensors


def test_wrong_input_is_named(tokens):
    logits, dense, labels, stages = tokens
    with pytest.raises(ValueError, match="unknown stage 'middle'"):
        Perplexity().add_batch(predictions=logits, references=labels, stages=["middle"] * 7)
    with pytest.raises(ValueError, match="2 names for 7 tokens"):
        Perplexity().add_batch(predictions=logits, references=labels, stages=stages[:2])
    with pytest.raises(ValueError, match=r"\(num_tokens,\)"):
        Perplexity().add_batch(predictions=logits, references=labels[:3])
    with pytest.raises(ValueError, match="differ"):
        KLToDense().add_batch(predictions=logits, references=dense[:, :5])
    with pytest.raises(ValueError, match="NaN or infinity"):
        KLToDense().add_batch(predictions=logits * math.nan, references=dense)


@pytest.mark.gpu
def test_logits_may_lie_on_an_accelerator(tokens, accelerator):
    logits, dense, labels, stages = tokens
    for metric, references in ((Perplexity(), labels), (KLToDense(), dense), (Top1Agreement(), dense)):
        expected = metric.compute(predictions=logits, references=references, stages=stages)
        there = {"predictions": logits.to(accelerator), "references": references.to(accelerator)}
        assert metric.compute(**there, stages=stages) == pytest.approx(expected, rel=1e-4)
