"""Which files weights are read from: safetensors in the checkpoint's own folder, whatever an index may say."""

import os
import stat
from pathlib import Path

from .artefact_file import read_json


def check_weight_index(path: str | os.PathLike, where: str) -> None:
    """
    Raises a `ValueError` if an index of weight files names anything but safetensors files beside it. transformers
    joins the names that stand there with the folder, so that `../` would lead out of it.

    Args:
        path (`str`): The index.
        where (`str`): The checkpoint, for the error.
    """
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"{where}: {Path(path).name} has no weight_map")
    for name in set(map(str, names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{where}: {Path(path).name} names {name!r}, no safetensors file beside it")


def share_as(weights: str | os.PathLike, file: str | os.PathLike) -> None:
    """Lets those read `weights` who can read `file`: safetensors writes for its own user alone."""
    os.chmod(weights, stat.S_IMODE(os.stat(file).st_mode))
