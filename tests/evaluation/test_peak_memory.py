import pytest
import torch

from hf_pdprune.evaluation.peak_memory import PeakMemory


def test_weights_are_counted_once_and_a_cpu_has_no_peak(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    peak = PeakMemory(model)
    with peak:
        torch.zeros(1000)
    assert peak.nbytes is None
    assert peak.weights == 4 * (sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers()))


@pytest.mark.gpu
def test_the_peak_is_that_of_the_model_alone(tiny_llama):
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    model = tiny_llama.to(torch.accelerator.current_accelerator())
    other = torch.zeros(10_000_000, device=model.device)
    peak = PeakMemory(model)
    with peak:
        more = torch.zeros(1_000_000, device=model.device)
    del more
    with peak:
        pass
    assert peak.weights + 4_000_000 <= peak.nbytes < peak.weights + 5_000_000 and other.numel()
