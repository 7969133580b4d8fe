"""Command line: how a recipe was called, as others can call it on their machine."""

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any


def command_line(recipe: str, *options: Any, folders: Collection[str] = ()) -> str:
    """
    The command that gives these options, those left out that have their default values.

    Args:
        recipe (`str`): Path of the recipe in the repository.
        options (dataclass instances): What its parser gave.
        folders (`Collection[str]`): Options whose values are places on one machine: `<name>` stands for them.
    """
    words = ["accelerate", "launch", recipe]
    for part in options:
        for option in dataclasses.fields(part):
            value = getattr(part, option.name)
            is_list = option.default_factory is not dataclasses.MISSING
            if value == (option.default_factory() if is_list else option.default):
                continue
            words.append(f"--{option.name}")
            if option.name in folders:
                words.append(f"<{option.name}>")
            else:
                words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)
