"""Distillation losses per token. Pure functions of logits and hidden states."""

import math

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
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(teacher, student) * temperature**2


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(student || teacher) of every token, in nats (MiniLLM, arXiv 2306.08543). Arguments as for [`forward_kl`]."""
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(student, teacher) * temperature**2


def jensen_shannon(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, mixture: float = 0.5
) -> torch.Tensor:
    """
    Generalised Jensen-Shannon divergence of every token, in nats (GKD, arXiv 2306.13649, equation 1):
    `b KL(teacher || m) + (1 - b) KL(student || m)` with `m = b teacher + (1 - b) student` and `b = mixture`. Other
    arguments as for [`forward_kl`].
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    middle = _mixed(teacher, student, mixture)
    return (mixture * _kl(teacher, middle) + (1 - mixture) * _kl(student, middle)) * temperature**2


def skewed_forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, mixture: float = 0.1
) -> torch.Tensor:
    """
    KL(teacher || a teacher + (1 - a) student) of every token with `a = mixture`: bounded, so that tokens which the
    student finds impossible do not dominate (DistiLLM, arXiv 2402.03898). Other arguments as for [`forward_kl`].
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(teacher, _mixed(teacher, student, mixture)) * temperature**2


def skewed_reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, mixture: float = 0.1
) -> torch.Tensor:
    """KL(student || (1 - a) teacher + a student) of every token with `a = mixture`; see [`skewed_forward_kl`]."""
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(student, _mixed(student, teacher, mixture)) * temperature**2


# By the name that an option gives them. Those of the second group mix the distributions.
PLAIN_LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
MIXTURE_LOSSES = {
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}
DISTILLATION_LOSSES = PLAIN_LOSSES | MIXTURE_LOSSES


def restricted_to_top_k(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Both distributions over `k + 1` events: the teacher's `k` likeliest tokens, and any other one. A divergence between
    these is never above that between the whole distributions (data processing inequality), and zero only where they
    agree on the `k` tokens.

    Args:
        student_logits (`torch.Tensor`): Shape `(..., vocab_size)`.
        teacher_logits (`torch.Tensor`): Shape `(..., vocab_size)`.
        k (`int`): Fewer than `vocab_size`.
        temperature (`float`, defaults to 1.0): Softens the whole distributions, before tokens are put together.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities of student and teacher, shape `(..., k + 1)`; as logits
        they stand for the same distributions.
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    tokens = teacher.topk(k, dim=-1).indices
    return _with_the_rest(student.gather(-1, tokens)), _with_the_rest(teacher.gather(-1, tokens))


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    name: str = "forward_kl",
    temperature: float = 1.0,
    mixture: float | None = None,
    top_k: int = 0,
) -> torch.Tensor:
    """
    The loss of every token by its name.

    Args:
        student_logits (`torch.Tensor`): Shape `(..., vocab_size)`.
        teacher_logits (`torch.Tensor`): Shape `(..., vocab_size)`; no gradient flows into it.
        name (`str`, defaults to `"forward_kl"`): One of `DISTILLATION_LOSSES`.
        temperature (`float`, defaults to 1.0): See [`forward_kl`].
        mixture (`float`, *optional*): For the losses of `MIXTURE_LOSSES`; default: that of the loss.
        top_k (`int`, defaults to 0): Tokens that are told apart (see [`restricted_to_top_k`]); 0: all.

    Returns:
        `torch.Tensor`: Shape `(...)`, in float32.
    """
    options = {} if mixture is None or name not in MIXTURE_LOSSES else {"mixture": mixture}
    if not 0 < top_k < teacher_logits.shape[-1]:
        return DISTILLATION_LOSSES[name](student_logits, teacher_logits, temperature, **options)
    student, teacher = restricted_to_top_k(student_logits, teacher_logits, top_k, temperature)
    return DISTILLATION_LOSSES[name](student, teacher, **options) * temperature**2


def relative_squared_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    Squared distance of hidden states in units of the teacher's squared norm.

    Args:
        student (`torch.Tensor`): Shape `(..., hidden_size)`.
        teacher (`torch.Tensor`): Shape `(..., hidden_size)`; no gradient flows into it.

    Returns:
        `torch.Tensor`: Shape `(...)`, in float32.
    """
    teacher = teacher.detach().float()
    return (student.float() - teacher).pow(2).sum(dim=-1) / teacher.pow(2).sum(dim=-1).clamp(min=1e-12)


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


def _log_probs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    def softened(logits: torch.Tensor) -> torch.Tensor:
        return (logits.float() if temperature == 1 else logits.float() / temperature).log_softmax(dim=-1)

    return softened(student), softened(teacher.detach())


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def _mixed(log_p: torch.Tensor, log_q: torch.Tensor, share_of_p: float) -> torch.Tensor:
    """Logarithm of `share_of_p * p + (1 - share_of_p) * q`."""
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))


def _with_the_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, and of all others together as one more event."""
    tiny = torch.finfo(log_probs.dtype).tiny
    rest = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp(min=tiny).log()
    return torch.cat([log_probs, rest], dim=-1)
