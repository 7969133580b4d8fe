"""Perplexity, KLToDense and Top1Agreement as metrics of the library evaluate, per stage, without any download."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..pair_layout import STAGES
from .token_statistics import token_statistics


DENSE_LOGITS = "the dense model's logits, of shape (num_tokens, vocab_size)"


class TokenMetric(evaluate.Metric, ABC):
    """
    Base of the metrics: one number per predicted token, the mean of them, and the mean by stage.

    Logits are reduced to one number per token before anything is stored, so that a metric takes 8 bytes a token and
    not a vocabulary. All that `evaluate.Metric` does works: several batches, several processes (`num_process`,
    `process_id`), `evaluate.combine`.

    Args:
        kwargs: As for `evaluate.Metric` (`keep_in_memory`, `num_process`, `process_id`, `experiment_id`, ...).
    """

    # Name of the result; what the references are.
    name_of_result: str
    references_are: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation="",
            inputs_description=(
                f"predictions: logits of shape (num_tokens, vocab_size). references: {self.references_are}. stages: "
                "'prefill' or 'decode' for each token, where results by stage are wanted."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, stages: Sequence[str] | None = None
    ) -> None:
        """
        Adds some tokens.

        Args:
            predictions (`torch.Tensor` or array): Logits, shape `(num_tokens, vocab_size)`.
            references (`torch.Tensor` or array): See the class.
            stages (`Sequence[str]`, *optional*): `"prefill"` or `"decode"` for each token: who predicted it.

        Raises:
            `ValueError`: If shapes do not fit, logits are not finite, or a stage is unknown.
        """
        values = self.values(torch.as_tensor(predictions), torch.as_tensor(references)).tolist()
        names = [""] * len(values) if stages is None else list(stages)
        if len(names) != len(values):
            raise ValueError(f"stages: {len(names)} names for {len(values)} tokens")
        unknown = [name for name in names if stages is not None and name not in STAGES]
        if unknown:
            raise ValueError(f"stages: unknown stage {unknown[0]!r}; there are prefill and decode")
        # Not by way of super(): evaluate copies this method without what super() needs.
        evaluate.Metric.add_batch(self, predictions=values, references=names)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """
        The result over all that was added, and over what is given here.

        Args:
            predictions (`torch.Tensor` or array, *optional*): As for `add_batch`.
            references (`torch.Tensor` or array, *optional*): As for `add_batch`.
            kwargs: `stages`, as for `add_batch`.

        Returns:
            `dict[str, float]`: The result by its name, with `_prefill` and `_decode` after it where stages were given.
            `None` where this is not the main process.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        return evaluate.Metric.compute(self)

    def _compute(self, predictions: Sequence[float], references: Sequence[str]) -> dict[str, float]:
        values, names = np.asarray(predictions), np.asarray(references)
        result = {self.name_of_result: self.of_mean(float(values.mean()))}
        for stage in STAGES:
            if (names == stage).any():
                result[f"{self.name_of_result}_{stage}"] = self.of_mean(float(values[names == stage].mean()))
        return result

    @abstractmethod
    def values(self, logits: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """One number per token, shape `(num_tokens,)`."""

    def of_mean(self, mean: float) -> float:
        """The result, from the mean over tokens."""
        return mean


class Perplexity(TokenMetric):
    """
    Perplexity per token. References are the tokens that came, shape `(num_tokens,)`.

    Example:

    ```python
    metric = Perplexity()
    metric.add_batch(predictions=logits, references=labels, stages=["prefill"] + ["decode"] * (len(labels) - 1))
    metric.compute()  # {"perplexity": ..., "perplexity_prefill": ..., "perplexity_decode": ...}
    ```
    """

    name_of_result = "perplexity"
    references_are = "the tokens that came, of shape (num_tokens,)"

    def values(self, logits: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return token_statistics(logits, labels=references).nll

    def of_mean(self, mean: float) -> float:
        return math.exp(min(mean, 700))  # e^709 is the end of floats


class KLToDense(TokenMetric):
    """KL(dense || model) in nats per token. References are the dense model's logits, shaped as the predictions."""

    name_of_result = "kl"
    references_are = DENSE_LOGITS

    def values(self, logits: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return token_statistics(logits, dense_logits=references).kl


class Top1Agreement(TokenMetric):
    """
    Share of tokens where the most likely one is the dense model's too. References are the dense model's logits.
    """

    name_of_result = "top1_agreement"
    references_are = DENSE_LOGITS

    def values(self, logits: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return token_statistics(logits, dense_logits=references).agrees
