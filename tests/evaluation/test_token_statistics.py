import pytest
import torch

from hf_pdprune.evaluation.token_statistics import token_statistics


def test_rows_of_any_number_are_those_of_single_tokens():
    """More rows than are turned into probabilities at once."""
    generator = torch.Generator().manual_seed(0)
    logits, dense = (torch.randn((600, 5), generator=generator) for _ in range(2))
    labels = torch.randint(5, (600,), generator=generator)
    found = token_statistics(logits, labels, dense)
    for row in (0, 255, 256, 599):
        alone = token_statistics(logits[row, None], labels[row, None], dense[row, None])
        for values, value in zip(found, alone, strict=True):
            torch.testing.assert_close(values[row, None], value)
    assert (found.kl >= 0).all() and found.nll.dtype == torch.float64


def test_only_what_is_asked_for():
    logits = torch.zeros((2, 3), dtype=torch.bfloat16)
    statistics = token_statistics(logits, labels=torch.tensor([0, 1]))
    assert statistics.kl is None and statistics.agrees is None
    assert statistics.nll.tolist() == pytest.approx([torch.tensor(3.0).log().item()] * 2)
    assert token_statistics(logits[:0], labels=torch.tensor([], dtype=torch.long)).nll.shape == (0,)
