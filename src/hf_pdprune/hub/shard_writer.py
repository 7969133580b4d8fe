"""Writes a model's checkpoint shard by shard; the weights of a shard are computed when it is its turn."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..artefact_file import write_artefact
from ..blocks import blocks_path
from ..weight_files import share_as


DEFAULT_SHARD_SIZE = "2GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_bytes(size: int | str) -> int:
    """Bytes that a size such as `"2GB"` or `"500MiB"` means. Raises a `ValueError` where it means none."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", str(size).strip().upper())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"max_shard_size must be a size such as '2GB' or '500MiB', got {size!r}")
    return int(match[1]) * _UNITS.get(match[2], 1)


def write_shards(
    model: PreTrainedModel,
    weights: Mapping[str, Callable[[], torch.Tensor]],
    folder: str | os.PathLike,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """
    Writes what `model.save_pretrained` writes, from weights that are computed shard by shard. In memory are one shard
    and its serialised copy, never the whole model a second time.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model; its own weights may be on the meta device.
        weights (`Mapping`): By name, in the order of the model's state dict, a function that gives the weight.
        folder (`str`): Folder of the checkpoint.
        max_shard_size (`int` or `str`): Size that a shard does not exceed unless a single block, or what is outside of
            the blocks, does.
    """
    folder = Path(folder)
    shards = list(_split(model, weights, shard_bytes(max_shard_size)))
    part, weight_map, total_size = folder / "part", {}, 0
    for number, names in enumerate(tqdm(shards, desc="shards", unit="shard", disable=len(shards) == 1), start=1):
        # transformers itself writes each shard: it unites tied weights, and gives the names that other tools know
        state_dict = {name: weights[name]() for name in names}
        model.save_pretrained(part, state_dict=state_dict, max_shard_size=2**62)
        del state_dict
        target = SAFE_WEIGHTS_NAME
        if len(shards) > 1:
            target = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        share_as(part / SAFE_WEIGHTS_NAME, part / CONFIG_NAME)
        os.replace(part / SAFE_WEIGHTS_NAME, folder / target)
        with safe_open(folder / target, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), target)
        total_size += _data_bytes(folder / target)
        for path in part.iterdir():  # the configs, the same each time
            os.replace(path, folder / path.name)
        shutil.rmtree(part)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_artefact(folder / SAFE_WEIGHTS_INDEX_NAME, index)


def _split(model: PreTrainedModel, names: Mapping[str, object], limit: int) -> Iterator[list[str]]:
    """
    The names of each shard. All of a block stays together: some checkpoint formats make one tensor of several of a
    block's weights, or several of one.
    """
    path = blocks_path(model) + "."
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        block = name[len(path) :].partition(".")[0] if name.startswith(path) else ""
        groups.setdefault(block, []).append(name)
    shard: list[str] = []
    for group in groups.values():
        if shard and sum(sizes[name] for name in (*shard, *group)) > limit:
            yield shard
            shard = []
        shard = shard + group
    yield shard


def _data_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
