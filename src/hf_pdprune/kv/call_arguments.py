"""CallArguments: reads and replaces an argument of a module's forward by name, however it was passed."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


class CallArguments:
    """
    Args:
        module (`nn.Module`): The module whose forward is called.
    """

    def __init__(self, module: nn.Module):
        function = getattr(module.forward, "__func__", None)
        self.index = _positions(module.forward) if function is None else _positions_without_self(function)

    def get(self, name: str, args: tuple, kwargs: dict) -> Any:
        """The argument's value, `None` if it is not there."""
        if name in kwargs:
            return kwargs[name]
        index = self.index.get(name, len(args))
        return args[index] if index < len(args) else None

    def replaced(self, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """`args` and `kwargs` with another value of one argument."""
        if name in kwargs or self.index[name] >= len(args):
            return args, {**kwargs, name: value}
        index = self.index[name]
        return (*args[:index], value, *args[index + 1 :]), kwargs

    def by_name(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.index, args, strict=False)), **kwargs}


def _positions(function: Callable) -> dict[str, int]:
    return {name: index for index, name in enumerate(inspect.signature(function).parameters)}


# A model's blocks share one forward, and a cache is made for every prompt.
@lru_cache(maxsize=64)
def _positions_without_self(method: Callable) -> dict[str, int]:
    return {name: index - 1 for name, index in _positions(method).items() if index}
