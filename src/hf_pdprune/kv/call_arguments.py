"""CallArguments: reads and replaces an argument of a module's forward by name, however it was passed."""

import inspect
from typing import Any

from torch import nn


class CallArguments:
    """
    Args:
        module (`nn.Module`): The module whose forward is called.
    """

    def __init__(self, module: nn.Module):
        self.index = {name: index for index, name in enumerate(inspect.signature(module.forward).parameters)}

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
