"""TrainingMetrics: what is logged of both stages, as exact means over completion tokens."""

import math
from collections.abc import Mapping

import torch
from accelerate.utils import reduce

from .distillation_step import StepOutput


class TrainingMetrics:
    """
    Adds up what batches give, on their device, and makes means of it when something is logged. So nothing waits for
    the device between two logs, and every completion token counts once, however batches and processes share them.
    """

    def __init__(self):
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, output: StepOutput, batch: Mapping[str, torch.Tensor]) -> None:
        """Adds a batch of this process."""
        read = batch["prompt_mask"].sum() + batch["completion_mask"].sum()
        sums = torch.cat([output.sums.flatten(), output.hidden_loss[None], read[None]]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self) -> dict[str, float]:
        """
        The means over all processes since the last call; empty where nothing was added. All processes have to call it.

        Returns:
            `dict[str, float]`: `kl` in nats per token and `perplexity`, the same of each stage for the tokens that it
            predicts, if there are any, as `prefill_kl`, `decode_kl` and so on, `top1_agreement`, `hidden_loss` per
            completion token, and `read_tokens`.
        """
        if self._sums is None:
            return {}
        *sums, hidden, read = reduce(self._sums, "sum").tolist()
        self._sums = None
        (prefill_kl, prefill_nll, prefill_agrees, first), (decode_kl, decode_nll, decode_agrees, rest) = (
            sums[:4],
            sums[4:],
        )
        tokens = max(first + rest, 1)
        metrics = {
            "kl": (prefill_kl + decode_kl) / tokens,
            "perplexity": _perplexity((prefill_nll + decode_nll) / tokens),
            "top1_agreement": (prefill_agrees + decode_agrees) / tokens,
            "hidden_loss": hidden / tokens,
            "read_tokens": int(read),
        }
        if first:
            metrics |= {"prefill_kl": prefill_kl / first, "prefill_perplexity": _perplexity(prefill_nll / first)}
        if rest:
            metrics |= {"decode_kl": decode_kl / rest, "decode_perplexity": _perplexity(decode_nll / rest)}
        return metrics


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
