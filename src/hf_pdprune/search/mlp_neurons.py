"""MLPNeurons: the hidden neurons of a block's MLP, which another block of the model can take over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters import dense_layer, dense_weight


class MLPNeurons:
    """
    The hidden neurons of a block's MLP. A neuron is what one row of each input layer (gate and up projection) makes of
    the normed hidden state; the output layer (down projection) adds a multiple of its column per neuron to the
    residual stream. Blocks of one model have MLPs of one shape, so that a block can take over neurons of another one:
    their rows, with the other block's norm folded in, and columns for them.

    Args:
        norm (`nn.Module`): What the MLP's input comes out of.
        mlp (`nn.Module`): The MLP.
        input_layers (`dict[str, nn.Module]`): Linear layers by name within the block whose output features are
            neurons, or several parts of as many features (a fused gate and up projection).
        output_layer (`nn.Module`): The linear layer that reads the neurons.
    """

    def __init__(self, norm: nn.Module, mlp: nn.Module, input_layers: dict[str, nn.Module], output_layer: nn.Module):
        self.norm = norm
        self.mlp = mlp
        self.input_layers = input_layers
        self.output_layer = output_layer

    @classmethod
    def find(cls, block: nn.Module, run: Callable[[], Any]) -> "MLPNeurons | None":
        """
        Looks for the MLP of a block by what happens when the block runs, not by names.

        Args:
            block (`nn.Module`): A decoder block, its linear layers adapted by peft or not.
            run (`Callable`): Runs the block on a few tokens, without adapters.

        Returns:
            [`MLPNeurons`] or `None`: `None` where the last linear layer's input is not made, feature by feature, from
            layers without bias that read one normed hidden state and nothing else (experts, layers with bias,
            post-norm blocks, an MLP that is given the residual stream too).
        """
        layers = linear_layers(block)
        output_name = next(reversed(layers), None)
        parent = mlp_path(block)
        if output_name is None or not parent:
            return None
        mlp, output_layer = block.get_submodule(parent), layers[output_name]
        input_layers = {n: layer for n, layer in layers.items() if n.startswith(f"{parent}.") and n != output_name}
        with _called_with(mlp) as hidden, _called_with(output_layer) as features, _leaf_outputs(block) as outputs:
            run()
        norms = [module for module, output in outputs if len(hidden) == 1 and output is hidden[0]]
        if len(norms) != 1 or len(features) != 1 or not input_layers:
            return None
        width = features[0].shape[-1]
        for layer in input_layers.values():
            linear = dense_layer(layer)
            if not isinstance(linear, nn.Linear) or linear.bias is not None:
                return None
            if linear.out_features % width or linear.in_features != hidden[0].shape[-1]:
                return None
        neurons = cls(norms[0], mlp, input_layers, output_layer)
        # Neurons are exchangeable if exchanging what the input layers give exchanges them.
        with _rolled_outputs(input_layers.values(), width):
            rolled = neurons._features(hidden[0])
        return neurons if torch.allclose(rolled, features[0].roll(1, dims=-1), rtol=1e-3, atol=1e-5) else None

    @property
    def columns(self) -> torch.Tensor:
        """What each neuron adds to the residual stream, shape `(num_neurons, hidden_size)`."""
        return dense_weight(self.output_layer).T

    def features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Activations of the neurons for hidden states that may be another block's.

        Args:
            hidden_states (`torch.Tensor`): Input of a norm, shape `(batch_size, seq_len, hidden_size)`.

        Returns:
            `torch.Tensor`: Shape `(batch_size, seq_len, num_neurons)`.
        """
        return self._features(self.norm(hidden_states))

    def scale_from(self, other: "MLPNeurons", hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        By what the other block's normed hidden states are to be multiplied to be this one's, shape `(hidden_size,)`;
        `None` if norms differ in more than a factor per feature.
        """
        own, others = (norm(hidden_states).flatten(0, -2).float() for norm in (self.norm, other.norm))
        scale = (own * others).sum(0) / others.pow(2).sum(0)
        rounding = 2 * torch.finfo(hidden_states.dtype).eps  # of both norms' outputs
        return scale if torch.allclose(others * scale, own, rtol=max(1e-3, rounding), atol=1e-4) else None

    def _features(self, normed: torch.Tensor) -> torch.Tensor:
        with _called_with(self.output_layer) as features:
            self.mlp(normed)
        return features[0]


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name, in the order of definition; an adapted one is the adapter layer."""
    layers: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if not inside and isinstance(module, (BaseTunerLayer, nn.Linear, Conv1D)):
            layers[name] = module
    return layers


def mlp_path(block: nn.Module) -> str:
    """Name, within a block, of the module that holds its last linear layer; empty if that is the block itself."""
    return next(reversed(linear_layers(block)), "").rpartition(".")[0]


def neuron_rows(layer: nn.Module, num_neurons: int) -> torch.Tensor:
    """The rows of an input layer by neuron, shape `(parts, num_neurons, hidden_size)`."""
    weight = dense_weight(layer)
    return weight.view(-1, num_neurons, weight.shape[-1])


@contextmanager
def _called_with(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the tensors that a module is called with."""
    tensors: list[torch.Tensor] = []

    def collect(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors.extend(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))

    handle = module.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        yield tensors
    finally:
        handle.remove()


@contextmanager
def _leaf_outputs(block: nn.Module) -> Iterator[list[tuple[nn.Module, torch.Tensor]]]:
    """Collects what each module without children of its own returns."""
    outputs: list[tuple[nn.Module, torch.Tensor]] = []
    leaves = [module for module in block.modules() if not any(module.children())]
    handles = [
        leaf.register_forward_hook(lambda module, args, output: outputs.append((module, output))) for leaf in leaves
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rolled_outputs(layers: Any, width: int) -> Iterator[None]:
    """Each neuron gets what the input layers made for its neighbour."""

    def roll(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(-1, (-1, width)).roll(1, dims=-1).flatten(-2)

    handles = [layer.register_forward_hook(roll) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
