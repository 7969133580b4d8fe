"""LocalDistillation: the adapters' start in closed form, before the first step of a training."""

from collections.abc import Iterable

import torch
from torch import nn

from ..data import pack_tokens
from ..plan import PruningPlan
from .residual_fit import ResidualFit
from .stage_adapters import StageAdapters


class LocalDistillation:
    """
    Fits the adapters that learn to what the first round removes (see [`ResidualFit`]).

    Args:
        model (`nn.Module`): The dense model with adapters.
        plan ([`PruningPlan`]): What is removed in the first round.
        adapters ([`StageAdapters`]): Which adapter each stage applies, and which of them learn.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, adapters: StageAdapters):
        self.model = model
        self.skipped_blocks = {
            adapter: plan.stage(adapters.stages_of(adapter)[0]).skipped_blocks for adapter in adapters.trained
        }

    def fit(self, rows: Iterable[dict[str, list[int]]], num_tokens: int) -> None:
        """
        Sets the adapters.

        Args:
            rows (`Iterable[dict]`): Training rows with `input_ids`.
            num_tokens (`int`): Tokens of them that are used, in rows of equal length.
        """
        # Rows of a packed data set are shorter than what positions the stages meet: they are joined.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        tokens = pack_tokens((row["input_ids"] for row in rows), num_tokens, context, self._device)
        fit = ResidualFit(self.model, tokens)
        for adapter, skipped in self.skipped_blocks.items():
            fit.fit(skipped, adapter)

    def freeze(self) -> None:
        """Lets the layers that are fitted learn no more. A resumed training, too, freezes them: it needs no data."""
        few = torch.arange(min(8, self.model.config.get_text_config().vocab_size), device=self._device)
        fit = ResidualFit(self.model, [few.unsqueeze(0)])
        for adapter, skipped in self.skipped_blocks.items():
            for parameter in fit.fitted_parameters(skipped, adapter):
                parameter.requires_grad_(False)

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device
