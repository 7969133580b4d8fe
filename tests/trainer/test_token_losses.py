import pytest
import torch
import torch.nn.functional as F

from hf_pdprune.trainer.losses import forward_kl
from hf_pdprune.trainer.token_losses import TokenLosses


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 11, 16, generator=generator)
    student_weight, teacher_weight = torch.randn(2, 40, 16, generator=generator)
    labels = torch.randint(0, 40, (11,), generator=generator)
    return (lambda h: h @ student_weight.T), (lambda h: h @ teacher_weight.T), student, teacher, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100, 0])
def test_chunks_change_neither_loss_nor_gradient(case, chunk_tokens):
    student_head, teacher_head, student, teacher, labels = case
    student.requires_grad_()
    logits, dense_logits = student_head(student), teacher_head(teacher)
    expected = 0.7 * forward_kl(logits, dense_logits) + 0.2 * F.cross_entropy(logits, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    losses = TokenLosses(distillation_weight=0.7, cross_entropy_weight=0.2, chunk_tokens=chunk_tokens)
    loss, measures = losses(*case)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not measures.requires_grad
    torch.testing.assert_close(measures[:, 0], forward_kl(logits, dense_logits).detach())
    torch.testing.assert_close(measures[:, 1], F.cross_entropy(logits, labels, reduction="none").detach())
    assert torch.equal(measures[:, 2], (logits.argmax(-1) == dense_logits.argmax(-1)).float())


def test_measures_are_the_same_whatever_the_loss(case):
    _, expected = TokenLosses()(*case)
    for options in ({"name": "reverse_kl"}, {"temperature": 3.0}, {"top_k": 3}, {"distillation_weight": 0.0}):
        loss, measures = TokenLosses(**{"cross_entropy_weight": 1.0, **options})(*case)
        torch.testing.assert_close(measures, expected)


def test_no_more_than_a_chunk_of_logits_is_held(case):
    student_head, teacher_head, student, teacher, labels = case
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TokenLosses(chunk_tokens=2)(student_head, teacher_head, student, teacher, labels)
    assert sum(sizes) <= 2 * student.numel() + 2 * labels.numel()


def test_heads_are_called_as_often_as_all_processes_agree_on(case):
    student_head, teacher_head, student, teacher, labels = case
    calls = []

    def head(hidden):
        calls.append(len(hidden))
        return student_head(hidden)

    TokenLosses()(head, teacher_head, student[:2].requires_grad_(), teacher[:2], labels[:2], num_chunks=4)
    assert sorted(calls) == [0, 0, 1, 1]
    loss, measures = TokenLosses()(head, teacher_head, student[:0], teacher[:0], labels[:0])
    assert loss.shape == (0,) and measures.shape == (0, 3)
