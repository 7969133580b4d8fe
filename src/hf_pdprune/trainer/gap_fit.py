"""GapFit: what a block beside a gap takes over of the missing blocks, as changes of its linear layers."""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .mlp_neurons import linear_layers


@dataclass
class GapFit:
    """
    Changes of a block's linear layers.

    Args:
        left (`float`): Part of the squared error behind the gap that they leave.
        deltas (`dict[str, torch.Tensor]`): By name of a layer within the block, what is added to its weight, shape
            `(out_features, in_features)`.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The same, as the two factors of a LoRA, of shapes
            `(rank, in_features)` and `(out_features, rank)`.
    """

    left: float
    deltas: dict[str, torch.Tensor]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @torch.no_grad()
    def apply(self, block: nn.Module, adapter: str) -> None:
        """Makes an adapter of the block's layers add the changes, and nothing else, in these layers."""
        layers = linear_layers(block)
        for name, delta in self.deltas.items():
            _set_factors(layers[name], adapter, *_as_factors(delta))
        for name, (down, up) in self.factors.items():
            _set_factors(layers[name], adapter, down, up)


def _as_factors(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    # Of about one size, so that gradients of both factors are too.
    balance = (delta.norm() / identity.norm()).sqrt() if bool(delta.any()) else torch.ones_like(delta[0, 0])
    factors = delta / balance, identity * balance
    return factors if delta.shape[0] < delta.shape[1] else factors[::-1]


def _set_factors(layer: BaseTunerLayer, adapter: str, down: torch.Tensor, up: torch.Tensor) -> None:
    # What is left of a rank beyond the factors' starts as LoRA does.
    layer.lora_A[adapter].weight[: len(down)].copy_(down / layer.scaling[adapter])
    layer.lora_B[adapter].weight.zero_()
    layer.lora_B[adapter].weight[:, : len(down)].copy_(up)
