"""Spread weights: models that are partitioned over processes (ZeRO-3, FSDP), or that lie on several devices."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from torch.distributed.tensor import DTensor

from .own_attribute import own_attribute


Batch = TypeVar("Batch")


def is_partitioned(module: nn.Module) -> bool:
    """Whether processes hold parts of the weights: all of them have to run the module together."""
    return any(map(is_part, module.parameters()))


def is_readable(*modules: nn.Module) -> bool:
    """Whether weights lie in this process as they are, and on one device; not so where they are loaded when used."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    devices = {parameter.device for parameter in parameters}
    return len(devices) == 1 and torch.device("meta") not in devices and not any(map(is_part, parameters))


def num_parameters(module: nn.Module) -> int:
    """Numbers in the weights of a module, also where this process holds a part of them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module is computed, which need not be where its weights are kept."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():  # accelerate brings what is offloaded to this device for each forward
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens."""
    return execution_device(model.get_input_embeddings())


def in_step(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """
    The batches of this process, and where weights are partitioned `None` as often as another process has more of them:
    all have to run the model equally often, on whatever it is.
    """
    if PartialState().num_processes == 1 or not is_partitioned(model):
        yield from batches
        return
    batches = list(batches)
    most = int(gather(torch.tensor([len(batches)], device=PartialState().device)).max())
    yield from batches
    yield from [None] * (most - len(batches))


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """
    Within this context a forward gathers what ZeRO-3 has partitioned, also where no engine of DeepSpeed sees to that:
    in a model that was loaded in partitions, before it is prepared for training.
    """
    prepared = "ds_id" in vars(model) or "_pdprune_gathers" in vars(model)
    parts = [] if prepared else [m for m in model.modules() if any(map(_is_zero_part, m.parameters(recurse=False)))]
    if not parts:
        yield
        return
    gathered: dict[nn.Module, AbstractContextManager[None]] = {}

    def gather_own(module: nn.Module, args: Any) -> None:
        gathered[module] = _gathered(module)
        gathered[module].__enter__()

    def release_own(module: nn.Module, args: Any, output: Any) -> None:
        gathered.pop(module).__exit__(None, None, None)

    handles = [part.register_forward_pre_hook(gather_own) for part in parts]
    handles += [part.register_forward_hook(release_own, always_call=True) for part in parts]
    try:
        with own_attribute(model, "_pdprune_gathers", True):
            yield
    finally:
        for handle in handles:
            handle.remove()


def whole_embeddings(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context the input embeddings can be read. All processes have to enter it."""
    embeddings = model.get_input_embeddings()
    return _gathered(embeddings) if _is_zero_part(embeddings.weight) else nullcontext()


def _gathered(module: nn.Module) -> AbstractContextManager[None]:
    import deepspeed  # it is installed where weights are partitioned by it

    return deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))


def _is_zero_part(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_status")


def is_part(parameter: nn.Parameter) -> bool:
    """Whether this process holds a part of the parameter."""
    return _is_zero_part(parameter) or isinstance(parameter, DTensor)
