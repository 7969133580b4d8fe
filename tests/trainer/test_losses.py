import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from trl.experimental.gkd import GKDTrainer

from hf_pdprune.trainer.losses import (
    DISTILLATION_LOSSES,
    MIXTURE_LOSSES,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    mean_over_labels,
    relative_squared_distance,
    restricted_to_top_k,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)


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


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_mixtures_are_those_of_the_papers(logits, share):
    student, teacher = (Categorical(logits=tensor) for tensor in logits)
    mixed = Categorical(probs=share * teacher.probs + (1 - share) * student.probs)
    expected = share * kl_divergence(teacher, mixed) + (1 - share) * kl_divergence(student, mixed)
    torch.testing.assert_close(jensen_shannon(*logits, mixture=share), expected)
    torch.testing.assert_close(skewed_forward_kl(*logits, mixture=share), kl_divergence(teacher, mixed))
    other = Categorical(probs=share * student.probs + (1 - share) * teacher.probs)
    torch.testing.assert_close(skewed_reverse_kl(*logits, mixture=share), kl_divergence(student, other))


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_jensen_shannon_is_trls(logits, beta):
    expected = GKDTrainer.generalized_jsd_loss(*logits, beta=beta, temperature=2.0, reduction="sum")
    torch.testing.assert_close(jensen_shannon(*logits, temperature=2.0, mixture=beta).sum() / 4, expected)


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
@pytest.mark.parametrize("top_k", [0, 5])
def test_loss_is_zero_for_equal_logits_and_no_gradient_reaches_the_teacher(name, top_k, logits):
    student, teacher = (tensor.requires_grad_() for tensor in logits)
    assert distillation_loss(student, student, name, top_k=top_k).abs().max() < 1e-6
    loss = distillation_loss(student, teacher, name, top_k=top_k)
    assert (loss > 0).all()
    loss.sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_temperature_softens_and_keeps_the_gradients_size(logits):
    student, teacher = logits
    softened = kl_divergence(Categorical(logits=teacher / 4), Categorical(logits=student / 4)) * 16
    torch.testing.assert_close(forward_kl(student, teacher, temperature=4.0), softened)
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=4.0, top_k=49), softened)


def test_top_k_tells_the_teachers_tokens_apart_and_puts_the_others_together(logits):
    student, teacher = logits
    events, teachers = restricted_to_top_k(student, teacher, 5)
    torch.testing.assert_close(events.exp().sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(teachers[..., :5].exp(), teacher.softmax(-1).topk(5).values)
    whole = forward_kl(student, teacher)
    parts = [distillation_loss(student, teacher, top_k=k) for k in (1, 5, 20, 49)]
    for smaller, larger in zip(parts, [*parts[1:], whole], strict=True):
        assert (smaller <= larger + 1e-6).all()
    assert torch.equal(distillation_loss(student, teacher, top_k=50), whole)


def test_mixture_is_passed_on_to_the_losses_that_have_one(logits):
    for name in DISTILLATION_LOSSES:
        changed = not torch.equal(distillation_loss(*logits, name, mixture=0.3), distillation_loss(*logits, name))
        assert changed == (name in MIXTURE_LOSSES)


def test_large_logits_stay_finite():
    student, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[1e4, 0.0, 0.0, 0.0]])
    for name in DISTILLATION_LOSSES:
        for top_k in (0, 2):
            (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, name, top_k=top_k).sum(), student)
            assert torch.isfinite(gradient).all(), (name, top_k)


def test_distance_is_relative_to_the_teachers_norm():
    teacher = torch.tensor([[3.0, 4.0]])
    assert relative_squared_distance(torch.zeros(1, 2), teacher) == pytest.approx(1.0)
    assert relative_squared_distance(1.1 * teacher, teacher) == pytest.approx(0.01, rel=1e-3)


def test_mean_counts_labelled_tokens_only():
    per_token = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 8.0, 16.0]])
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert mean_over_labels(per_token, labels) == pytest.approx((1 + 2 + 4) / 3)
    assert mean_over_labels(per_token, labels, num_items=14) == pytest.approx(7 / 14)
