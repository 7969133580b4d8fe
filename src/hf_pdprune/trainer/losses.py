"""Distillation losses per token. Pure functions of logits."""

import torch
import torch.nn.functional as F


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(teacher || student) of every token, in nats.

    Args:
        student_logits (`torch.Tensor`): Shape `(..., vocab_size)`.
        teacher_logits (`torch.Tensor`): Shape `(..., vocab_size)`; no gradient flows into it.
        temperature (`float`, defaults to 1.0): Both distributions are softened by it; the result is multiplied by its
            square, so that gradients keep their size (Hinton et al., arXiv 1503.02531).

    Returns:
        `torch.Tensor`: Shape `(...)`, in float32.
    """
    student = (student_logits.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(student || teacher) of every token, in nats (MiniLLM, arXiv 2306.08543). Arguments as for [`forward_kl`]."""
    student = (student_logits.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(dim=-1) * temperature**2


DISTILLATION_LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def mean_over_labels(
    per_token: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Sum of `per_token` where the label is not -100, divided by the number of such labels.

    Args:
        per_token (`torch.Tensor`): Shape `(batch_size, completion_tokens)`.
        labels (`torch.Tensor`): Shape `(batch_size, completion_tokens)`.
        num_items (`int`, *optional*): Divides instead, where a batch is one of several that make up a step.
    """
    mask = labels != -100
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=per_token.device)
    return torch.where(mask, per_token, 0.0).sum() / count.clamp(min=1)
