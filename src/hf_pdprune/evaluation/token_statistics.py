"""TokenStatistics: what each predicted token says about quality. Pure tensor maths, shared by all that measures."""

from typing import NamedTuple

import torch
from torch.nn.functional import kl_div


# Rows of logits that are turned into float32 log-probabilities at once: 256 x 150k tokens of vocabulary are 150 MB.
_ROWS = 256


class TokenStatistics(NamedTuple):
    """
    One value per token, float64 on the CPU, each of shape `(num_tokens,)`; `None` where it was not asked for.

    Args:
        nll (`torch.Tensor`, *optional*): Negative log-likelihood of the token that came, in nats.
        kl (`torch.Tensor`, *optional*): KL(dense || these logits), in nats.
        agrees (`torch.Tensor`, *optional*): 1 where the most likely token is the dense model's, else 0.
    """

    nll: torch.Tensor | None
    kl: torch.Tensor | None
    agrees: torch.Tensor | None


def token_statistics(
    logits: torch.Tensor, labels: torch.Tensor | None = None, dense_logits: torch.Tensor | None = None
) -> TokenStatistics:
    """
    Args:
        logits (`torch.Tensor`): Shape `(num_tokens, vocab_size)`.
        labels (`torch.LongTensor`, *optional*): The tokens that came, shape `(num_tokens,)`; for `nll`.
        dense_logits (`torch.Tensor`, *optional*): The dense model's, shaped as `logits`; for `kl` and `agrees`.

    Raises:
        `ValueError`: If logits are not finite, or if shapes do not fit.
    """
    if logits.dim() != 2 or (labels is not None and labels.shape != logits.shape[:1]):
        shapes = f"{tuple(logits.shape)}{'' if labels is None else f' and {tuple(labels.shape)}'}"
        raise ValueError(f"logits must be (num_tokens, vocab_size) and labels (num_tokens,), got {shapes}")
    if dense_logits is not None and dense_logits.shape != logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and the dense model's {tuple(dense_logits.shape)} differ")
    parts: list[list[torch.Tensor]] = [[], [], []]
    for begin in range(0, len(logits), _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_probs = logits[rows].float().log_softmax(dim=-1)
        if labels is not None:
            parts[0].append(-log_probs.gather(-1, labels[rows, None])[:, 0])
        if dense_logits is not None:
            dense = dense_logits[rows].float().log_softmax(dim=-1)
            # Below 0 by rounding only.
            parts[1].append(kl_div(log_probs, dense, reduction="none", log_target=True).sum(dim=-1).clamp(min=0))
            parts[2].append(log_probs.argmax(dim=-1) == dense.argmax(dim=-1))
    asked = (labels is not None, dense_logits is not None, dense_logits is not None)
    statistics = TokenStatistics(
        *(
            (torch.cat(part) if part else torch.zeros(0)).double().cpu() if wanted else None
            for part, wanted in zip(parts, asked, strict=True)
        )
    )
    for values in statistics[:2]:
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError("logits hold NaN or infinity (a dtype too narrow for the model?)")
    return statistics
