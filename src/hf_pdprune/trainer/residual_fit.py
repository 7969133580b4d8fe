"""ResidualFit: local distillation in closed form, from which a stage's adapter starts."""

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..blocks import get_blocks
from ..search.gap_fit import GapFit
from ..search.gap_regression import GapRegression, Gaps
from ..search.mlp_neurons import linear_layers, mlp_path


logger = logging.getLogger(__name__)


class ResidualFit:
    """
    Starts a stage's adapter where the blocks on both sides of each gap do the work of the missing ones as well as
    they can (see [`GapRegression`]): the MLP before the gap takes over neurons of the missing blocks' MLPs, and the
    MLP after the gap does the same with what is still missing.

    Gaps are fitted on the dense model's hidden states, each by itself (but for those with one block between them): no
    stage has to run, and what stages have in common is fitted once. Following the errors that all earlier gaps leave
    takes three times as long for the same text, and more text is worth more.

    Neurons can move where the adapter's rank is enough for any change of the MLP's weights; elsewhere the block before
    a gap gets a correction of its last linear layer.

    Args:
        model (`nn.Module`): The dense model with LoRA adapters.
        input_ids (`Sequence[torch.LongTensor]`): Batches of shape `(batch_size, tokens)`, without padding.

    Attributes:
        fitted (`dict[str, list[str]]`): By adapter, the linear layers that have been set, as `"<block>.<name>"`.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[torch.LongTensor]):
        self.blocks = get_blocks(model)
        self.regression = GapRegression(model, input_ids)
        self.fitted: dict[str, list[str]] = {}
        # Stages need mostly the same ones.
        self._fits: dict[tuple, GapFit | None] = {}
        self._behind: dict[tuple, list[torch.Tensor]] = {}

    def fit(self, missing_blocks: Collection[int], adapter: str) -> dict[int, float]:
        """
        Fits one stage.

        Args:
            missing_blocks (`Collection[int]`): Blocks that add nothing to the stage's hidden states.
            adapter (`str`): The stage's adapter. In the fitted layers it learns anew.

        Returns:
            `dict[int, float]`: By fitted block, the part of the squared error that is left on these tokens.
        """
        beside = blocks_beside_gaps(len(self.blocks), missing_blocks)
        left: dict[int, float] = {}
        layers = self.fitted.setdefault(adapter, [])
        path: tuple = ()
        description = f"Local distillation, {adapter}"
        for block, gaps in tqdm(beside.items(), desc=description, disable=not PartialState().is_main_process):
            # What a fit depends on: the block, its gaps, and the blocks fitted before it with no other in between.
            path = (*(path if gaps.before else ()), (block, gaps.behind, self._rank(block, adapter)))
            hidden = self._behind[path[:-1]] if gaps.before else self.regression.dense_at(min((block, *gaps.behind)))
            if path not in self._fits:
                self._fits[path] = self._fit_block(block, gaps, adapter, hidden)
            fit = self._fits[path]
            if fit is not None:
                fit.start_adapter(self.blocks, block, adapter)
                left[block] = fit.left
                layers += [f"{block}.{name}" for name in fit.layers]
            if gaps.behind and path not in self._behind:
                with nullcontext() if fit is None else fit.active(self.blocks, block):
                    self._behind[path] = self.regression.advance(hidden, (block,))
        logger.info("local distillation of %s: %s of the squared error is left per block", adapter, left)
        return left

    def _fit_block(self, block: int, gaps: Gaps, adapter: str, hidden: list[torch.Tensor]) -> GapFit | None:
        """What a block takes over of its gaps; `None` where nothing fits."""
        rank = self._rank(block, adapter)
        if rank is None:
            return None
        return self.regression.fit(block, gaps, rank, hidden, self._takes_neurons(block, adapter))

    def _rank(self, block: int, adapter: str) -> int | None:
        """Rank of the adapter in the block's last linear layer; `None` where it has none there."""
        layer = next(reversed(linear_layers(self.blocks[block]).values()), None)
        return layer.r.get(adapter) if isinstance(layer, BaseTunerLayer) else None

    def _takes_neurons(self, block: int, adapter: str) -> bool:
        """Whether the adapter's rank is enough for any change of the weights of the block's MLP."""
        parent = mlp_path(self.blocks[block])
        layers = linear_layers(self.blocks[block]).items()
        return all(_takes_any_delta(layer, adapter) for name, layer in layers if name.startswith(f"{parent}."))


def blocks_beside_gaps(total_blocks: int, missing_blocks: Collection[int]) -> dict[int, Gaps]:
    """
    The kept blocks that do the work of missing ones. Where the first blocks are missing, the first kept block does
    their work, as if they came behind it.
    """
    kept = [block for block in range(total_blocks) if block not in missing_blocks]
    behind = [
        tuple(range(block + 1, following)) for block, following in zip(kept, [*kept[1:], total_blocks], strict=True)
    ]
    behind[0] = (*range(kept[0]), *behind[0])
    before = [(), *behind[:-1]]
    if kept[0] > 0 and len(kept) > 1:  # only those between the two
        before[1] = tuple(range(kept[0] + 1, kept[1]))
    found = {block: Gaps(*gaps) for block, *gaps in zip(kept, before, behind, strict=True)}
    return {block: gaps for block, gaps in found.items() if gaps.before or gaps.behind}


def fitted_layers(model: nn.Module, missing_blocks: Collection[int]) -> list[str]:
    """Names, within the list of blocks, of the linear layers that [`ResidualFit`] may set: MLPs beside gaps."""
    blocks = get_blocks(model)
    names = []
    for block in blocks_beside_gaps(len(blocks), missing_blocks):
        layers, parent = linear_layers(blocks[block]), mlp_path(blocks[block])
        names += [f"{block}.{name}" for name in layers if name.rpartition(".")[0] == parent]
    return names


def _takes_any_delta(layer: nn.Module, adapter: str) -> bool:
    """Whether the adapter's rank is enough for any change of the layer's weight."""
    if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
        return False
    return layer.r[adapter] >= min(layer.in_features, layer.out_features)
