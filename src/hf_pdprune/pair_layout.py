"""What a pair of stages consists of: a checkpoint for each stage, or one that serves both (the unified setting)."""

import os
from collections.abc import Iterable
from pathlib import Path


STAGES = ("prefill", "decode")
# The stages that a checkpoint or an adapter serves, by its name.
_SERVED_STAGES = {"prefill": ("prefill",), "decode": ("decode",), "unified": STAGES}
CHECKPOINTS = tuple(_SERVED_STAGES)
# What a pair can consist of.
DISAGGREGATED, UNIFIED = ("prefill", "decode"), ("unified",)
LAYOUTS = (DISAGGREGATED, UNIFIED)


def check_first_token(stage: str) -> None:
    """Raises a `ValueError` unless `first_token`, who predicts the first token of a completion, is a stage."""
    if stage not in STAGES:
        raise ValueError(f"first_token must be {' or '.join(STAGES)}, got {stage!r}")


def served_stages(checkpoint: str) -> tuple[str, ...]:
    """The stages that a checkpoint serves: itself, or both for `"unified"`. A `ValueError` for an unknown name."""
    if checkpoint not in _SERVED_STAGES:
        raise ValueError(f"unknown stage {checkpoint!r}; known: {', '.join(CHECKPOINTS)}")
    return _SERVED_STAGES[checkpoint]


def by_stage(checkpoints: Iterable[str]) -> dict[str, str]:
    """The checkpoint (or adapter) that serves each stage. A `ValueError` where two serve the same."""
    serving: dict[str, str] = {}
    for checkpoint in checkpoints:
        for stage in served_stages(checkpoint):
            if stage in serving:
                raise ValueError(f"{serving[stage]} and {checkpoint} are both for the {stage} stage: remove one")
            serving[stage] = checkpoint
    return serving


def layout_of(there: Iterable[str], where: str) -> tuple[str, ...]:
    """
    The layout of a pair.

    Args:
        there (`Iterable[str]`): Checkpoints that are there.
        where (`str`): Place of the pair, for errors.

    Raises:
        `FileNotFoundError`: If a checkpoint is missing.
        `ValueError`: If a stage is there twice.
    """
    serving = by_stage(there)
    missing = [stage for stage in STAGES if stage not in serving]
    if missing:
        other = "" if serving else " (nor unified/config.json)"
        raise FileNotFoundError(f"{where} has no {missing[0]} stage: there is no {missing[0]}/config.json{other}")
    return tuple(dict.fromkeys(serving[stage] for stage in STAGES))


def checkpoint_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """
    The folders of a pair's checkpoints, by their names.

    Raises:
        `FileNotFoundError`: If a checkpoint is missing.
        `ValueError`: If a stage is there twice.
    """
    there = [checkpoint for checkpoint in CHECKPOINTS if (Path(folder) / checkpoint / "config.json").is_file()]
    return {checkpoint: Path(folder) / checkpoint for checkpoint in layout_of(there, str(folder))}


def stage_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """The folder from which each stage is loaded; raises what [`checkpoint_folders`] raises."""
    folders = checkpoint_folders(folder)
    return {stage: folders[checkpoint] for stage, checkpoint in by_stage(folders).items()}
