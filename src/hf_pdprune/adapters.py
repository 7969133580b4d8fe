"""Adapters: one LoRA per stage over one copy of the dense weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """
    The adapted modules of a model by name; empty where peft has not wrapped it.

    Raises:
        `ValueError`: If peft trains copies of whole modules or tokens, which are no adapters of a layer.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"modules_to_save and trainable_token_indices are not supported (found at {name})")
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
    return layers


@contextmanager
def active_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """
    Within this context `adapter` is applied, or none at all where it is `None`.

    Unlike `PeftModel.set_adapter` it leaves `requires_grad` alone: in one training step both stages run, and both
    adapters learn.

    Args:
        model (`nn.Module`): A model with or without adapters.
        adapter (`str`, *optional*): Name of the adapter; layers that do not have it run without.

    Raises:
        `ValueError`: If no layer of the model has an adapter of that name.
    """
    layers = list(adapter_layers(model).values())
    if adapter is not None and not any(adapter in layer._all_available_adapter_names() for layer in layers):
        raise ValueError(f"the model has no adapter {adapter!r}")
    # peft's own switch, `set_adapter`, flips requires_grad along with the name: hence its attributes.
    previous = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (name, disabled) in zip(layers, previous, strict=True):
            layer._active_adapter, layer._disable_adapters = name, disabled


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by name."""
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in f"{name}."}


class MergedWeights(Mapping[str, torch.Tensor]):
    """
    The dense model's weights with what `adapter` learned added to them, by the names that the model has without peft.
    A weight is merged when it is read, so that a model can be written without a second copy of it in memory. The
    dense weights are not changed.

    Args:
        model (`nn.Module`): A model, wrapped by peft or not.
        adapter (`str`, *optional*): Adapter to merge; `None` for the dense weights as they are.
    """

    def __init__(self, model: nn.Module, adapter: str | None):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.adapter = adapter
        self._layers = adapter_layers(base)
        self._dense: dict[str, torch.Tensor] = {}
        self._prefixes: dict[str, str] = {}  # of the weights that belong to adapted modules
        self._last: tuple[str | None, dict[str, torch.Tensor]] = (None, {})
        for name, tensor in base.state_dict().items():
            parts = name.split(".")
            ends = (".".join(parts[:end]) for end in range(1, len(parts)))
            prefix = next((prefix for prefix in ends if prefix in self._layers), None)
            if prefix is None:
                self._dense[name] = tensor
            elif name.startswith(f"{prefix}.base_layer."):  # all else in an adapted module belongs to adapters
                name = name.replace(".base_layer.", ".", 1)
                self._dense[name] = tensor
                if adapter in self._layers[prefix]._all_available_adapter_names():
                    self._prefixes[name] = prefix

    def __len__(self) -> int:
        return len(self._dense)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dense)

    def __contains__(self, name: object) -> bool:
        return name in self._dense

    def is_adapted(self, name: str) -> bool:
        """Whether the adapter changes this weight."""
        return name in self._prefixes

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        prefix = self._prefixes.get(name)
        if prefix is None:
            return self._dense[name]
        if self._last[0] != prefix:  # weight and bias of a module come one after the other
            layer = copy.deepcopy(self._layers[prefix])
            layer.merge(adapter_names=[self.adapter])
            weights = layer.get_base_layer().state_dict().items()
            self._last = prefix, {f"{prefix}.{key}": tensor for key, tensor in weights}
        return self._last[1][name]


def merged_state_dict(model: nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    """All of [`MergedWeights`] at once: a second copy of the adapted weights."""
    return dict(MergedWeights(model, adapter))
