"""Whole weights, for a while, of a model that is partitioned over processes (ZeRO-3, FSDP2)."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..spread_weights import is_part


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_STATE = "__composable_api_state_key"  # begins the names under which FSDP2 keeps its state in a module


@contextmanager
def whole_weights(model: nn.Module, keep: bool = True) -> Iterator[None]:
    """
    Within this context a model that ZeRO-3 has partitioned or FSDP2 has sharded has all its weights in the processes
    that `keep` them, on the CPU (buffers, too): an accelerator need not have room for all. They are gathered one by
    one. To these processes it is an ordinary model meanwhile, but for `generate`. All processes have to enter the
    context.

    Args:
        model (`nn.Module`): A model, partitioned or not.
        keep (`bool`, defaults to `True`): Whether this process needs the weights.
    """
    with ExitStack() as stack:
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            stack.enter_context(_without_fsdp(model))
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if is_part(parameter)
        ]
        if places:
            stack.enter_context(_replaced(model, places, keep))
        yield


@contextmanager
def _without_fsdp(model: nn.Module) -> Iterator[None]:
    wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        module.reshard()  # what was left gathered after a forward has the dtype of computation
    before = [
        (module, type(module), {k: v for k, v in vars(module).items() if k.startswith(_STATE)}) for module in wrapped
    ]
    try:
        for module, wrapper, attributes in before:
            # Beside hooks, FSDP2 lives in a state, and in a class whose modules cannot be copied.
            module.__class__ = wrapper.__mro__[2]
            for name in attributes:
                del vars(module)[name]
        yield
    finally:
        for module, wrapper, attributes in before:
            module.__class__ = wrapper
            vars(module).update(attributes)


@contextmanager
def _replaced(model: nn.Module, places: list[tuple[nn.Module, str, nn.Parameter]], keep: bool) -> Iterator[None]:
    whole: dict[int, nn.Parameter] = {}  # by identity: weights that are tied stay so
    for _, _, parameter in places:
        if id(parameter) not in whole:
            whole[id(parameter)] = nn.Parameter(whole_copy(parameter, keep), parameter.requires_grad)
    buffers = [
        (module._buffers, n, b) for module in model.modules() for n, b in module._buffers.items() if b is not None
    ]
    hooks = [(module, {name: vars(module)[name] for name in _HOOKS}) for module in model.modules()]
    try:
        for module, _ in hooks:  # they would gather
            vars(module).update((name, OrderedDict()) for name in _HOOKS)
        for owner, name, buffer in buffers:
            owner[name] = buffer.cpu()
        for module, name, parameter in places:
            setattr(module, name, whole[id(parameter)])
        yield
    finally:
        for module, own in hooks:
            vars(module).update(own)
        for module, name, parameter in places:
            setattr(module, name, parameter)
        for owner, name, buffer in buffers:
            owner[name] = buffer


def whole_copy(parameter: nn.Parameter, keep: bool = True) -> torch.Tensor:
    """
    The whole of a parameter of which processes hold parts, on the CPU; without memory for those that do not `keep` it.
    All have to ask.
    """
    if isinstance(parameter, DTensor):
        return _on_cpu(parameter.detach().full_tensor(), keep)
    import deepspeed  # it is installed where weights are partitioned by it

    with deepspeed.zero.GatheredParameters([parameter]):
        return _on_cpu(parameter.detach(), keep)


def _on_cpu(data: torch.Tensor, keep: bool) -> torch.Tensor:
    return data.to("cpu", copy=True) if keep else torch.empty_like(data, device="meta")


@torch.no_grad()
def set_sharded(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """
    Sets parameters that FSDP2 has sharded, in all processes.

    Args:
        parameters (`Mapping[str, torch.Tensor]`): They, by name, or what shares memory with them.
        values (`Mapping[str, torch.Tensor]`): A whole value for each, the same in all processes.
    """
    for name, parameter in parameters.items():
        value = values[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
