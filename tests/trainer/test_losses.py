import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hf_pdprune.trainer import forward_kl, mean_over_labels, reverse_kl


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 50, generator=generator), torch.randn(2, 3, 50, generator=generator)


def test_kl_is_that_of_the_distributions(logits):
    student, teacher = logits
    forward = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    reverse = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    torch.testing.assert_close(forward_kl(student, teacher), forward)
    torch.testing.assert_close(reverse_kl(student, teacher), reverse)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_loss_is_zero_for_equal_logits_and_no_gradient_reaches_the_teacher(loss, logits):
    student, teacher = (tensor.requires_grad_() for tensor in logits)
    assert loss(student, student).abs().max() < 1e-6
    loss(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_temperature_softens_and_keeps_the_gradients_size(logits):
    student, teacher = logits
    softened = kl_divergence(Categorical(logits=teacher / 4), Categorical(logits=student / 4)) * 16
    torch.testing.assert_close(forward_kl(student, teacher, temperature=4.0), softened)


def test_mean_counts_labelled_tokens_only():
    per_token = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 8.0, 16.0]])
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert mean_over_labels(per_token, labels) == pytest.approx((1 + 2 + 4) / 3)
    assert mean_over_labels(per_token, labels, num_items=14) == pytest.approx(7 / 14)
