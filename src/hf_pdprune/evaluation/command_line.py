"""Command line: how a recipe was called, as others can call it on their machine."""

import dataclasses
import json
import shlex
from collections.abc import Collection
from enum import Enum
from typing import Any


# Never to be seen in a file that is shown to others.
_SECRETS = {"hub_token", "push_to_hub_token"}


def command_line(recipe: str, *options: Any, folders: Collection[str] = ()) -> str:
    """
    The command that gives these options, without secrets and without those that have their default values.

    Args:
        recipe (`str`): Path of the recipe in the repository.
        options (dataclass instances): What its parser gave.
        folders (`Collection[str]`): Options whose values are places on one machine: `<name>` stands for them.
    """
    words = ["accelerate", "launch", recipe]
    for part in options:
        fields = [option for option in dataclasses.fields(part) if option.init and option.name not in _SECRETS]
        required = {option.name: getattr(part, option.name) for option in fields if _is_required(option)}
        defaults = _defaults(part, required)
        for name in (option.name for option in fields):
            value = getattr(part, name)
            if name not in required and value == defaults[name]:
                continue
            words.append(f"--{name}")
            if name in folders:
                words.append(f"<{name}>")
            else:
                words += [_word(name, item) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def _defaults(part: Any, required: dict[str, Any]) -> dict[str, Any]:
    """The defaults as __post_init__ leaves them, since so are the options."""
    try:
        return vars(type(part)(**required))
    except ValueError:  # one of several options must be given: there is nothing with the defaults alone
        optional = [option for option in dataclasses.fields(part) if not _is_required(option)]
        made = {o.name: o.default_factory() for o in optional if o.default_factory is not dataclasses.MISSING}
        return made | {o.name: o.default for o in optional if o.name not in made}


def _is_required(option: dataclasses.Field) -> bool:
    return option.default is option.default_factory is dataclasses.MISSING


def _word(name: str, value: Any) -> str:
    if isinstance(value, str):
        called, is_named, place = value.rpartition("=")  # `name=folder`, or a folder alone
        if place.startswith(("/", "~")):  # a place on one machine as well
            return f"{called}{is_named}<{name}>"
    if isinstance(value, dict):
        return shlex.quote(json.dumps(value))
    return shlex.quote(str(value.value if isinstance(value, Enum) else value))
