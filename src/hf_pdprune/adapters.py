"""Adapters: one LoRA per stage over one copy of the dense weights."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """
    The adapted modules of a model by name; empty where peft has not wrapped it.

    Raises:
        `ValueError`: If peft trains copies of whole modules or tokens, which are no adapters of a layer; if an adapter
        is merged into the dense weights, which would then be the dense model's no more.
    """
    layers, seen = {}, set()

    def visit(name: str, module: nn.Module) -> None:
        # What named_modules does, without its nested generators: it runs with every prompt and in every step.
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"modules_to_save and trainable_token_indices are not supported (found at {name})")
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(
                    f"the adapter {module.merged_adapters[0]!r} is merged into the dense weights (found at {name}): "
                    "both stages and the dense model share them; call unmerge_adapter() first"
                )
            layers[name] = module
        prefix = f"{name}." if name else ""
        for child, submodule in module._modules.items():
            if submodule is not None:
                visit(prefix + child, submodule)

    visit("", model)
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


def dense_layer(layer: nn.Module) -> nn.Module:
    """The linear layer itself, within an adapter's wrapping."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, without what adapters add to it; computed anew where it is quantised."""
    linear = dense_layer(layer)
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        linear.state_dict()  # bitsandbytes has packed it otherwise for a forward on a CPU, and undoes that here
    return dequantize_module_weight(linear)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is not the numbers themselves (4 or 8 bits, bitsandbytes)."""
    weight = module._parameters.get("weight")
    return weight is not None and type(weight).__name__ in ("Params4bit", "Int8Params")


def outermost_layer(name: str, layers: Collection[str]) -> str | None:
    """The name of the adapted module, of those in `layers`, that a weight belongs to; `None` for other weights."""
    parts = name.split(".")
    return next((prefix for end in range(1, len(parts)) if (prefix := ".".join(parts[:end])) in layers), None)


def nested_layers(layer: BaseTunerLayer) -> list[BaseTunerLayer]:
    """An adapted module's wrappers, from the outermost one: experts have one for each of their parameters."""
    wrappers = [layer]
    while isinstance(layer := layer.base_layer, BaseTunerLayer):
        wrappers.append(layer)
    return wrappers


def name_without_adapters(name: str, layers: Collection[str]) -> str | None:
    """The name that a weight has in the dense model; `None` where it belongs to an adapter."""
    prefix = current = outermost_layer(name, layers)
    if prefix is None:
        return name
    rest = name[len(prefix) + 1 :]
    while current in layers:
        if not rest.startswith("base_layer."):
            return None
        rest, current = rest.removeprefix("base_layer."), f"{current}.base_layer"
    return f"{prefix}.{rest}"


class MergedWeights(Mapping[str, torch.Tensor]):
    """
    The dense model's weights with what `adapter` learned added to them, by the names that the model has without peft.
    A weight is merged when it is read, so that a model can be written without a second copy of it in memory; quantised
    weights are dequantised then, too. The dense weights are not changed.

    Args:
        model (`nn.Module`): A model, wrapped by peft or not.
        adapter (`str`, *optional*): Adapter to merge; `None` for the dense weights as they are.

    Raises:
        `ValueError`: On reading a weight that is not in memory, or into which the adapter cannot be merged.
    """

    def __init__(self, model: nn.Module, adapter: str | None):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.adapter = adapter
        self._layers = adapter_layers(base)
        self._dense: dict[str, torch.Tensor] = {}
        self._prefixes: dict[str, str] = {}  # of the weights that belong to adapted modules
        self._quantized: dict[str, nn.Module] = {}  # by name of the weight
        self._dtype = base.dtype
        self._last: tuple[str | None, dict[str, torch.Tensor]] = (None, {})
        quantized = {name: module for name, module in base.named_modules() if is_quantized(module)}
        for name, tensor in base.state_dict().items():
            owner = outermost_layer(name, quantized)
            if owner is not None and name[len(owner) + 1 :] not in quantized[owner]._parameters:
                continue  # scales and the like
            prefix, dense_name = outermost_layer(name, self._layers), name_without_adapters(name, self._layers)
            if dense_name is None:
                continue
            self._dense[dense_name] = tensor
            if owner is not None and name == f"{owner}.weight":
                self._quantized[dense_name] = quantized[owner]
            wrappers = [] if prefix is None else nested_layers(self._layers[prefix])
            if any(adapter in wrapper._all_available_adapter_names() for wrapper in wrappers):
                self._prefixes[dense_name] = prefix

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
        if self._dense[name].is_meta:
            raise ValueError(
                f"the weight {name} is offloaded: load the model into memory as a whole (no device_map that offloads)"
            )
        prefix = self._prefixes.get(name)
        if name in self._quantized:
            return self._dequantized(name)
        if prefix is None:
            return self._dense[name]
        if self._last[0] != prefix:  # weight and bias of a module come one after the other
            layer = copy.deepcopy(self._layers[prefix])
            for wrapper in nested_layers(layer):
                if self.adapter in wrapper._all_available_adapter_names():
                    wrapper.merge(adapter_names=[self.adapter])
            weights = layer.get_base_layer().state_dict().items()
            self._last = prefix, {f"{prefix}.{key}": tensor for key, tensor in weights}
        return self._last[1][name]

    def _dequantized(self, name: str) -> torch.Tensor:
        """A quantised weight with what the adapter adds to it: peft's own merging would quantise the sum again."""
        weight = dense_weight(self._quantized[name]).to(self._dtype)
        if name not in self._prefixes:
            return weight
        for wrapper in nested_layers(self._layers[self._prefixes[name]]):
            if self.adapter in wrapper._all_available_adapter_names():
                if not isinstance(wrapper, LoraLayer) or self.adapter in wrapper.lora_variant:
                    raise ValueError(
                        f"the adapter {self.adapter!r} cannot be merged into the quantised weight {name}: it is no "
                        "plain LoRA (DoRA and the like)"
                    )
                down, up = wrapper.lora_A[self.adapter].weight, wrapper.lora_B[self.adapter].weight
                delta = (up.float() @ down.float()) * wrapper.scaling[self.adapter]
                weight = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        return weight


def merged_state_dict(model: nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    """All of [`MergedWeights`] at once: a second copy of the adapted weights."""
    return dict(MergedWeights(model, adapter))
