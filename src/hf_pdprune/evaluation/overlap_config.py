"""OverlapConfig: whether rows that search or distillation has seen may be evaluated, and the check for them."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artefact_file import read_json
from ..data import load_text, single_sources
from ..run_folder import RUN_FILE_NAME
from .text_overlap import TextOverlap


logger = logging.getLogger(__name__)

Source = tuple[str, str, str | None]


@dataclass(kw_only=True)
class OverlapConfig:
    """
    Options of every recipe that evaluates, and the check that all of them call before their long work.

    Parameters:
        seen_data (`list[str]`, *optional*):
            What search and distillation have seen, each as `source:split` or `source:split:subset`. Default: what the
            run.json beside the plan or the stages says.
        allow_overlap (`bool`, *optional*, defaults to `False`):
            Go on where rows that are evaluated were seen in search or distillation.
    """

    seen_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What search and distillation have seen, each as source:split or source:split:subset. Default: "
            "what the run.json beside the plan or the stages says."
        },
    )
    allow_overlap: bool = field(
        default=False, metadata={"help": "Go on where rows that are evaluated were seen in search or distillation."}
    )

    def __post_init__(self):
        for entry in self.seen_data:
            if not 2 <= len(entry.split(":")) <= 3:
                raise ValueError(f"seen_data: {entry!r} is not source:split or source:split:subset")

    def check_overlap(
        self,
        evaluated: Iterable[tuple[str, Iterable[str]]],
        folders: Sequence[str | os.PathLike] = (),
        sources: Sequence[Source] = (),
    ) -> dict[str, Any]:
        """
        Counts rows to be evaluated that were seen in search or distillation.

        Args:
            evaluated (`Iterable[tuple]`): Name and texts of each part; not read where nobody says what was seen.
            folders (`Sequence[str]`, *optional*): Where the plan or the stages are, with the run.json of their run.
            sources (`Sequence[tuple]`, *optional*): Source, split and subset of what the recipe itself will show to a
                search or a training.

        Returns:
            `dict`: `checked`, and `seen_rows`, how many of each part were seen.

        Raises:
            `ValueError`: If rows were seen, unless that is allowed.
        """
        sources = [*sources, *(self._named() or (source for folder in folders for source in sources_of_run(folder)))]
        if not sources:
            logger.warning("nobody says what search and distillation have seen (seen_data): overlap is not checked")
            return {"checked": False}
        seen = TextOverlap()
        for source, split, subset in dict.fromkeys(sources):
            # One by one: joined, a prompt and its completion can become one text, by which a prompt is not found.
            for name in single_sources(source, split, subset):
                seen.add(load_text(name, split, subset=subset))
        counts = {name: seen.count(texts) for name, texts in evaluated}
        found = {name: count for name, count in counts.items() if count}
        for name, count in found.items():
            message = f"{name}: {count} of the evaluation rows were seen in search or distillation"
            if not self.allow_overlap:
                raise ValueError(f"{message}; evaluate on others, or --allow_overlap true")
            logger.warning("%s", message)
        return {"checked": True, "seen_rows": found}

    def _named(self) -> list[Source]:
        return [(*entry.split(":"), None)[:3] for entry in self.seen_data]


def sources_of_run(folder: str | os.PathLike) -> list[Source]:
    """What the run that has left its run.json in a folder was calibrated and distilled on; empty without one."""
    path = Path(folder) / RUN_FILE_NAME
    steps = read_json(path) if path.is_file() else {}
    parts = [(steps.get(step, {}), part) for step, part in (("plan", "calibration"), ("stages", "train"))]
    return [
        (settings[f"{part}_dataset"], settings.get(f"{part}_split"), settings.get(f"{part}_subset"))
        for settings, part in parts
        if settings.get(f"{part}_dataset")
    ]
