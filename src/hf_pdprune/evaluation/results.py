"""results.json: what was measured of a pair of stages."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..artefact_file import read_json, write_artefact


RESULTS_FILE_NAME = "results.json"


def write_results(folder: str | os.PathLike, results: Mapping[str, Any], replaced: Collection[str] = ()) -> Path:
    """
    Writes `results.json` into a folder, as a whole or not at all, and keeps parts that it holds already.

    Args:
        folder (`str`): Where the artefacts of a run are.
        results (`Mapping`): Parts by name: `quality` and `quality_all_tokens` (see [`compare_quality`]), `speed` and
            `kv` (see [`SpeedBenchmark`]), and what else a recipe measures.
        replaced (`Collection[str]`): Parts that do not stay where `results` has none of that name: those that the
            recipe makes sometimes, which would otherwise stand beside results that they do not belong to.

    Raises:
        `ValueError`: If a number is not finite, which JSON cannot hold; or if what is there is not valid.
    """
    path = Path(folder) / RESULTS_FILE_NAME
    there = read_results(folder) if path.is_file() else {}
    merged = {**{name: part for name, part in there.items() if name not in replaced}, **results}
    try:
        return write_artefact(path, merged)
    except ValueError as error:
        raise ValueError(f"{RESULTS_FILE_NAME}: a result is NaN or infinite") from error


def record_command(folder: str | os.PathLike, recipe: str, command: str) -> None:
    """
    Keeps in `results.json` by which command a recipe has made its part.

    Args:
        folder (`str`): Where the artefacts of a run are.
        recipe (`str`): Name of the recipe.
        command (`str`): See [`command_line`].
    """
    there = read_results(folder) if (Path(folder) / RESULTS_FILE_NAME).is_file() else {}
    write_results(folder, {"commands": {**there.get("commands", {}), recipe: command}})


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
    """
    Reads `results.json` from a folder (or the file itself).

    Raises:
        `FileNotFoundError`: If there is none.
        `ValueError`: If it is not valid.
    """
    path = Path(folder)
    path = path / RESULTS_FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no {RESULTS_FILE_NAME} in {folder!s}")
    results = read_json(path)
    if not isinstance(results, dict) or any(not isinstance(part, dict | list) for part in results.values()):
        raise ValueError(f"{path} must hold a JSON object of objects")
    return results


def kl_closed(quality: Mapping[str, Mapping[str, float]]) -> float | None:
    """Share of the KL that pruning opened which healing has closed; `None` where that was not measured."""
    if "unhealed" not in quality or "healed" not in quality or quality["unhealed"]["kl"] <= 0:
        return None
    return 1 - quality["healed"]["kl"] / quality["unhealed"]["kl"]
