import pytest
import torch
from transformers import DynamicCache

from hf_pdprune.evaluation.peak_memory import PeakMemory


DEVICES = ["cpu", pytest.param("accelerator", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("accelerator")


def test_weights_are_counted_once(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    assert PeakMemory(model).nbytes is None
    with PeakMemory(model) as peak:
        pass
    parameters, buffers = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers()))
    assert peak.nbytes == peak.weights == 4 * (parameters + buffers)


def test_the_peak_is_that_of_the_model_alone(tiny_llama, device):
    model = tiny_llama.to(device)
    other = torch.zeros(10_000_000, device=device)
    peak = PeakMemory(model)
    with peak:
        more = torch.zeros(1_000_000, device=device)
    del more
    with peak:
        pass
    assert peak.weights + 4_000_000 <= peak.nbytes < peak.weights + 5_000_000 and other.numel()


@torch.no_grad()
def test_a_cache_that_was_there_before_counts(tiny_llama, device):
    model, tokens = tiny_llama.to(device), 400
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    prompt = torch.zeros(1, tokens, dtype=torch.long, device=device)
    for cache in caches:
        model(prompt, past_key_values=cache)
    with PeakMemory(model, caches[0]) as peak:
        model(prompt[:, :1], past_key_values=caches[0])
    layer = 2 * 2 * 16 * 4 * tokens  # keys and values, 2 heads of 16 numbers, float32
    # A layer's new keys and values are there beside the old ones, one layer after the other. An accelerator's kernels
    # need room of their own.
    at_most = 8 if device.type == "cpu" else 10
    assert peak.weights + 6 * layer < peak.nbytes < peak.weights + at_most * layer
