"""GapFit: what a block beside a gap takes over of the missing blocks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import dense_layer, dense_weight
from ..own_attribute import own_attribute
from .mlp_neurons import linear_layers, neuron_rows


@dataclass
class TakenNeurons:
    """
    The neurons that a block's MLP has afterwards, of its own ones and those of missing blocks. Only what is new is
    kept; rows are those of the dense model.

    Args:
        blocks (`tuple[int, ...]`): Whose neurons they are; first the block itself.
        input_layers (`tuple[str, ...]`): Names within a block of the linear layers whose rows neurons are.
        scales (`torch.Tensor`): By what the block's normed hidden states are to be multiplied to be those that each
            block's neurons were made for, shape `(num_blocks, hidden_size)`.
        chosen (`torch.LongTensor`): Numbers of the neurons, those of all blocks counted one after the other, shape
            `(num_neurons,)`.
        columns (`torch.Tensor`): What each adds to the residual stream, shape `(num_neurons, hidden_size)`.
    """

    blocks: tuple[int, ...]
    input_layers: tuple[str, ...]
    scales: torch.Tensor
    chosen: torch.LongTensor
    columns: torch.Tensor

    def weight(self, blocks: Sequence[nn.Module], name: str) -> torch.Tensor:
        """The weight of an input layer with these neurons, shape `(out_features, hidden_size)`."""
        width, parts = len(self.columns), []
        for place, (number, scale) in enumerate(zip(self.blocks, self.scales, strict=True)):
            of_block = self.chosen[(self.chosen >= place * width) & (self.chosen < (place + 1) * width)]
            rows = neuron_rows(linear_layers(blocks[number])[name], width)
            rows = rows[:, (of_block - place * width).to(rows.device)]
            parts.append(rows * scale.to(rows))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def to(self, device: torch.device | str) -> "TakenNeurons":
        """The same on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("scales", "chosen", "columns")}
        return replace(self, **tensors)


@dataclass
class GapFit:
    """
    What a block's MLP does beside a gap: either neurons that it takes over, or a low-rank correction of its last
    linear layer.

    Args:
        left (`float`): Part of the squared error behind the gap that is left, on the tokens that neurons were chosen
            on.
        output_layer (`str`): Name within the block of its last linear layer.
        neurons ([`TakenNeurons`], *optional*): The MLP's neurons.
        correction (`tuple[torch.Tensor, torch.Tensor]`, *optional*): What is added to the last layer, as the factors
            of a LoRA, of shapes `(rank, in_features)` and `(out_features, rank)`.
    """

    left: float
    output_layer: str
    neurons: TakenNeurons | None = None
    correction: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def layers(self) -> list[str]:
        """Names within the block of the linear layers that do it."""
        return [*(self.neurons.input_layers if self.neurons is not None else ()), self.output_layer]

    @contextmanager
    def active(self, blocks: Sequence[nn.Module], number: int) -> Iterator[None]:
        """
        Within this context a block of the dense model does it.

        Args:
            blocks (`Sequence[nn.Module]`): The model's blocks, adapted by peft or not.
            number (`int`): The block's number.
        """
        layers = linear_layers(blocks[number])
        if self.neurons is None:
            handle = dense_layer(layers[self.output_layer]).register_forward_hook(self._add_correction)
            try:
                yield
            finally:
                handle.remove()
            return
        with torch.no_grad():
            weights = self._weights(blocks)
        with ExitStack() as stack:
            for name, weight in weights.items():  # not by way of the layer's parameter, which may be quantised
                layer = dense_layer(layers[name])
                forward = partial(_linear, weight=weight, bias=layer.bias)
                stack.enter_context(own_attribute(layer, "forward", forward))
            yield

    @torch.no_grad()
    def start_adapter(self, blocks: Sequence[nn.Module], number: int, adapter: str) -> None:
        """
        Makes an adapter of a block's layers do it, and nothing else, in these layers.

        Args:
            blocks (`Sequence[nn.Module]`): The model's blocks, adapted by peft.
            number (`int`): The block's number.
            adapter (`str`): Name of the adapter.

        Raises:
            `ValueError`: If the adapter leaves out one of the layers, or has too small a rank there.
        """
        layers = linear_layers(blocks[number])
        factors = {}
        if self.neurons is None:
            factors[self.output_layer] = self.correction
        else:
            for name, weight in self._weights(blocks).items():
                factors[name] = _as_factors(weight.float() - dense_weight(layers[name]).float())
        for name, (down, _) in factors.items():
            layer = layers[name]
            if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
                raise ValueError(
                    f"adapter {adapter!r} has no LoRA in {name} of block {number}, which takes over others"
                )
            if layer.r[adapter] < len(down):
                raise ValueError(
                    f"adapter {adapter!r} has rank {layer.r[adapter]} in {name} of block {number}, which takes over "
                    f"others and needs {len(down)}"
                )
        for name, (down, up) in factors.items():
            _set_factors(layers[name], adapter, down, up)

    def _weights(self, blocks: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
        """The MLP's weights by name of the layer."""
        weights = {name: self.neurons.weight(blocks, name) for name in self.neurons.input_layers}
        return weights | {self.output_layer: self.neurons.columns.T}

    def _add_correction(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        down, up = self.correction
        return output + F.linear(F.linear(args[0], down.to(output)), up.to(output))

    def to(self, device: torch.device | str) -> "GapFit":
        """The same on `device`."""
        if self.neurons is not None:
            return replace(self, neurons=self.neurons.to(device))
        return replace(self, correction=tuple(factor.to(device) for factor in self.correction))

    # As tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as tensors by name, for a file."""
        if self.neurons is None:
            down, up = self.correction
            return {"left": torch.tensor(self.left), "down": down.contiguous(), "up": up.contiguous()}
        neurons = self.neurons
        return {
            "left": torch.tensor(self.left),
            "blocks": torch.tensor(neurons.blocks),
            "scales": neurons.scales.contiguous(),
            "chosen": neurons.chosen.contiguous(),
            "columns": neurons.columns.contiguous(),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], output_layer: str, input_layers: Sequence[str]
    ) -> "GapFit":
        """
        From what [`GapFit.tensors`] made.

        Args:
            tensors (`Mapping[str, torch.Tensor]`): The tensors.
            output_layer (`str`): See [`GapFit`].
            input_layers (`Sequence[str]`): See [`TakenNeurons`].
        """
        left = float(tensors["left"])
        if "down" in tensors:
            return cls(left, output_layer, correction=(tensors["down"], tensors["up"]))
        blocks = tuple(tensors["blocks"].tolist())
        taken = (tensors[name] for name in ("scales", "chosen", "columns"))
        return cls(left, output_layer, TakenNeurons(blocks, tuple(input_layers), *taken))


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(states, weight.to(states), bias)


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
