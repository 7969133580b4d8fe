"""LiveTensors: how much memory the tensors of a computation take on a CPU, where no allocator counts."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveTensors(TorchDispatchMode):
    """
    Context that follows what operations return, from when it is made until nobody holds it. What a kernel needs for
    itself meanwhile is not seen, nor is memory that the process keeps after use: unlike the process's size, the count
    is the same on every machine and in every run. It takes time at every operation.

    Args:
        held (`Iterable[torch.Tensor]`, *optional*): Tensors that are there before, and may go. They count as nothing,
            and as less when they have gone.

    Attributes:
        nbytes (`int`): Bytes now, beyond those before.
        peak (`int`): The most that they were.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self.nbytes = self.peak = 0
        for tensor in held:
            self._follow(tensor)
        self.nbytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _on_cpu((args, kwargs)):  # what operations take, but none returned, was there before
            self._known.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **kwargs)
        for tensor in _on_cpu(result):
            self._follow(tensor)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        self.nbytes += storage.nbytes()
        self.peak = max(self.peak, self.nbytes)
        weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False

    def _forget(self, nbytes: int) -> None:
        self.nbytes -= nbytes


def _on_cpu(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]
