"""Runs a recipe from the command line: its options, and every expected end of it in one line."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from trl import TrlParser
from yaml import YAMLError


# Options of recipes that say where something is. Data sets are not among them: they may be ids, or several in one.
_PLACES = {
    "data_folder", "dense", "healed", "model", "model_name_or_path", "notes", "output", "output_dir", "plan", "runs",
    "stages",
}  # fmt: skip


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it was written, and the defaults."""


def run_recipe(main: Callable[..., None], *options: type, description: str, goes_on: bool = False) -> None:
    """
    Reads the options (`--config` a YAML file of them), runs the recipe, and ends the process with 1 after an error and
    with 130 after Ctrl-C.

    Args:
        main (`Callable`): Takes an instance of each dataclass.
        options (dataclasses): The options.
        description (`str`): What `--help` says first.
        goes_on (`bool`, defaults to `False`): Whether the same command goes on where it was interrupted.
    """
    # An option that is cut short would be another one as soon as there are two that begin so.
    description = f"{description.strip()}\n\n--config <file>: a YAML file with options."
    parser = TrlParser(options, description=description, formatter_class=_Help, allow_abbrev=False)
    with errors_in_one_line(goes_on):
        main(*map(with_home, parser.parse_args_and_config()))


@contextmanager
def errors_in_one_line(goes_on: bool = False) -> Iterator[None]:
    """Within this context what a user can be told in a line ends the process with it; see [`run_recipe`]."""
    try:
        yield
    except (ValueError, OSError, SafetensorError, YAMLError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted" + ("; the same command goes on from here" if goes_on else "") + "\n")
        sys.exit(130)


def with_home(options: Any) -> Any:
    """Options (a dataclass instance) whose places have the home folder for `~`, which a YAML file leaves as it is."""
    for name in (field.name for field in dataclasses.fields(options) if field.name in _PLACES):
        value = getattr(options, name)
        if isinstance(value, list):
            setattr(options, name, [_expanded(item) for item in value])
        elif isinstance(value, str):
            setattr(options, name, _expanded(value))
    return options


def _expanded(place: str) -> str:
    called, is_named, path = place.rpartition("=")  # `name=folder`, or a folder alone
    return f"{called}{is_named}{Path(path).expanduser()}" if path.startswith("~") else place
