"""PeakMemory: the most memory that one model needs, where several lie on the same device."""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from .live_tensors import LiveTensors


class PeakMemory:
    """
    Context around what a model does. The peak is that of the model alone: its weights, what its cache holds, and the
    most that was allocated beyond what lay on the device before. Over several uses the largest counts.

    On a CPU no allocator counts, and tensors are followed instead (see [`LiveTensors`]). That takes time, so that what
    is timed is to be measured in another turn.

    Args:
        model (`nn.Module`): The model.
        cache ([`~transformers.Cache`], *optional*): What the model goes on with, where that was there before.

    Attributes:
        nbytes (`int`, *optional*): The peak in bytes; `None` before the first use.
    """

    def __init__(self, model: nn.Module, cache: Cache | None = None):
        self.device = model.get_input_embeddings().weight.device
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.cache = cache
        self.nbytes: int | None = None
        self._before = 0
        self._live: LiveTensors | None = None

    def __enter__(self) -> "PeakMemory":
        held = [] if self.cache is None else cache_tensors(self.cache)
        # A view keeps all of its storage; several may share one.
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        self._before = -sum(storages.values())
        if self.device.type == "cpu":
            self._live = LiveTensors(held).__enter__()
        else:
            torch.accelerator.reset_peak_memory_stats(self.device)
            self._before += torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)
            peak, self._live = self._live.peak, None
        else:
            peak = torch.accelerator.max_memory_allocated(self.device)
        self.nbytes = max(self.nbytes or 0, self.weights + peak - self._before)


def cache_tensors(cache: Cache) -> list[torch.Tensor]:
    """The keys and values that a cache holds."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]
