"""BlockCheckpointing: activation checkpointing of decoder blocks that write into a KV cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from ..adapters import active_adapter, adapter_layers
from ..blocks import get_blocks


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """
    Within this context each block keeps its input alone, and is computed again in the backward pass.

    transformers' own activation checkpointing leaves out the KV cache, through which the stages are connected here: a
    block that is computed again would append its keys and values once more. Here the block's part of the cache is set
    back to what it was before the block ran, and to what it is now afterwards. The adapter is the one that was active
    in the forward, too. Everything is restored at the end of the context; the backward pass may come after it.

    Args:
        model (`nn.Module`): A causal language model, wrapped by peft or not.
    """
    blocks = get_blocks(model)
    originals = list(blocks)
    try:
        for number, block in enumerate(originals):
            blocks[number] = CheckpointedBlock(block, number)
        yield
    finally:
        for number, block in enumerate(originals):
            blocks[number] = block


class CheckpointedBlock(nn.Module):
    """
    Takes the place of a block in the list, and runs it under [`torch.utils.checkpoint.checkpoint`].

    Args:
        block (`nn.Module`): The block.
        number (`int`): Its number, which is that of its layer in the cache.
    """

    def __init__(self, block: nn.Module, number: int):
        super().__init__()
        self.block = self.__dict__["stands_for"] = block
        self.number = number

        @functools.wraps(block.forward)  # who looks for an argument's place finds the block's
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.block(*args, **kwargs)
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        layer = caches[0].layers[self.number] if caches else None
        adapter = _adapter_of(self.block)
        before = dict(vars(layer)) if layer is not None else {}
        runs = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1 or layer is None:
                return self.block(*args, **kwargs)
            now = dict(vars(layer))
            try:
                _set(layer, before)
                return self.block(*args, **kwargs)
            finally:
                _set(layer, now)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), nullcontext() if adapter is _NO_LAYERS else active_adapter(self.block, adapter)

        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, determinism_check="none", **kwargs)


_NO_LAYERS = object()


def _adapter_of(block: nn.Module) -> Any:
    """The adapter that acts in a block now, `None` if it is switched off, `_NO_LAYERS` if there is none."""
    layers = list(adapter_layers(block).values())
    if not layers:
        return _NO_LAYERS
    names = [] if layers[0].disable_adapters else layers[0].active_adapters
    there = [name for name in names if any(name in layer._all_available_adapter_names() for layer in layers)]
    return there[0] if there else None


def _set(layer: Any, state: dict[str, Any]) -> None:
    vars(layer).clear()
    vars(layer).update(state)
