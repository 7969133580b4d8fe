"""LocalDistillation: the adapters' start in closed form, before the first step of a training."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from peft import PeftModel
from torch import nn

from ..artefact_file import read_json, write_artefact
from ..blocks import get_blocks
from ..data import pack_tokens
from ..plan import PruningPlan
from ..shortened_config import context_length
from .residual_fit import ResidualFit, fitted_layers
from .stage_adapters import StageAdapters


FITTED_LAYERS_FILE_NAME = "fitted_layers.json"


class LocalDistillation:
    """
    Fits new adapters to what the first round removes (see [`ResidualFit`]), once, and knows which of their layers it
    has set. That depends on the data and on rounding, so it is written down with each checkpoint.

    Args:
        plan ([`PruningPlan`]): What is removed in the first round.
        adapters ([`StageAdapters`]): Which adapter each stage applies.
        new (`Collection[str]`): The adapters to be fitted; others have learned something already.

    Attributes:
        fitted (`dict[str, list[str]]`): By adapter, the linear layers that have been set, as `"<block>.<name>"`.
    """

    def __init__(self, plan: PruningPlan, adapters: StageAdapters, new: Collection[str]):
        skipped = {name: plan.stage(adapters.stages_of(name)[0]).skipped_blocks for name in adapters.trained}
        self.skipped_blocks = {name: blocks for name, blocks in skipped.items() if name in new}
        self._skipped_before = {name: blocks for name, blocks in skipped.items() if name not in new}
        self.fitted: dict[str, list[str]] = {}

    def recognise(self, model: PeftModel) -> None:
        """
        Takes for set, of adapters that are not new, the layers that their own training will have set: those beside
        gaps with another rank than the adapter's.
        """
        blocks = get_blocks(model)
        for adapter, skipped in self._skipped_before.items():
            usual = getattr(model.peft_config[adapter], "r", None)
            for name in fitted_layers(model, skipped):
                ranks = getattr(blocks.get_submodule(name), "r", {})
                if ranks.get(adapter, usual) != usual:
                    self.fitted.setdefault(adapter, []).append(name)

    def fit(self, model: nn.Module, rows: Iterable[dict[str, list[int]]], num_tokens: int) -> None:
        """
        Sets the new adapters. To a model whose adapters have been set it does nothing.

        Args:
            model (`nn.Module`): The dense model with adapters.
            rows (`Iterable[dict]`): Training rows with `input_ids`.
            num_tokens (`int`): Tokens of them that are used, in rows of equal length.
        """
        if not self.skipped_blocks:
            return
        # Rows of a packed data set are shorter than what positions the stages meet: they are joined.
        context = context_length(model.config)
        device = model.get_input_embeddings().weight.device
        tokens = pack_tokens((row["input_ids"] for row in rows), num_tokens, context, device)
        fit = ResidualFit(model, tokens)
        for adapter, skipped in self.skipped_blocks.items():
            fit.fit(skipped, adapter)
        self.fitted, self.skipped_blocks = self.fitted | fit.fitted, {}

    def freeze(self, model: nn.Module) -> None:
        """Lets the layers that have been set learn no more; the model as for [`LocalDistillation.fit`]."""
        blocks = get_blocks(model)
        for adapter, layers in self.fitted.items():
            for name in layers:
                layer = blocks.get_submodule(name)
                for part in (layer.lora_A, layer.lora_B):
                    part[adapter].weight.requires_grad_(False)

    # Checkpoints

    def save(self, folder: str | os.PathLike) -> None:
        """Writes which layers have been set into a checkpoint."""
        write_artefact(Path(folder) / FITTED_LAYERS_FILE_NAME, self.fitted)

    def load(self, folder: str | os.PathLike) -> None:
        """Takes over what a checkpoint says; its weights are those of its adapters."""
        self.fitted, self.skipped_blocks = read_json(Path(folder) / FITTED_LAYERS_FILE_NAME), {}
