"""RunFolder: what the steps of one run have left, and with which settings."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .artefact_file import read_json, write_artefact


logger = logging.getLogger(__name__)

RUN_FILE_NAME = "run.json"


class RunFolder:
    """
    The folder of one run. Each step records the settings that it was made with, and refuses to go on in a folder whose
    step was made with others.

    Where several processes run, all of them make and ask it, and the main one alone reads, writes and removes files.

    Args:
        folder (`str`): The folder.
        files_of_step (`Mapping[str, Sequence[str]]`): What each step leaves there, files or folders, in the order of
            the steps.
        overwrite (`bool`, defaults to `False`): Whether what other settings have made is made anew instead.
        options (`Sequence[type]`): Dataclasses whose fields are settings. A setting that was not recorded, since the
            version that made the step did not have it, counts as the default, or as unchanged where there is none.
        needed (`Mapping[str, Sequence[str]]`, *optional*): Patterns of files without which a step is not done: one
            that has lost them is made again, with those after it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        files_of_step: Mapping[str, Sequence[str]],
        overwrite: bool = False,
        options: Sequence[type] = (),
        needed: Mapping[str, Sequence[str]] | None = None,
    ):
        self.folder = Path(folder)
        self.files_of_step = files_of_step
        self.overwrite = overwrite
        self.defaults = {key: value for kind in options for key, value in _defaults(kind).items()}
        self.path = self.folder / RUN_FILE_NAME
        self.steps: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, str] = {}
        state = PartialState()
        if state.is_main_process and self.path.is_file():
            self.steps = read_json(self.path)
            self.lost = self._lost(needed or {})
        if state.num_processes > 1:  # none may read what another one has recorded since
            self.steps, self.lost = broadcast_object_list([self.steps, self.lost])

    def _lost(self, needed: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """The steps to be made again, each with why: the first one that has lost a file, and those after it."""
        lost: dict[str, str] = {}
        for step in self.files_of_step:
            missing = [pattern for pattern in needed.get(step, ()) if not any(self.folder.glob(pattern))]
            if lost:
                lost[step] = "what it was made from is made again"
            elif missing and step in self.steps:
                lost[step] = f"{missing[0]} is no longer there"
        return lost

    def is_done(self, step: str, settings: dict[str, Any]) -> bool:
        """Whether `step` was done with these settings; others are a `ValueError`, or forgotten with `overwrite`."""
        if step not in self.steps:
            return False
        recorded = self.defaults | self.steps[step]
        changed = [key for key in settings if key in recorded and recorded[key] != settings[key]]
        if not changed and step in self.lost:
            if PartialState().is_main_process:
                logger.warning("%s: the step %s is done again: %s", self.folder, step, self.lost[step])
            return False
        if not changed:
            return True
        if not self.overwrite:
            key = changed[0]
            raise ValueError(
                f"{self.folder} holds a run with {key}={recorded.get(key)!r}, not {settings[key]!r}: choose another "
                "--output_dir, or --overwrite true"
            )
        self._forget(step)
        return False

    def changed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that are not the default: what a name is made of that a younger option must not change."""
        return {k: v for k, v in settings.items() if k not in self.defaults or self.defaults[k] != v}

    def _forget(self, step: str) -> None:
        """Removes what `step` and those after it have made."""
        order = list(self.files_of_step)
        for name in order[order.index(step) :]:
            self.steps.pop(name, None)
            self.lost.pop(name, None)
            for file in self.files_of_step[name] if PartialState().is_main_process else ():
                path = self.folder / file
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self._write()
        PartialState().wait_for_everyone()  # else one might find what another one is about to remove

    def done(self, step: str, settings: dict[str, Any]) -> None:
        """Records that `step` is done with these settings."""
        self.lost.pop(step, None)
        # An interrupted run must not take what is still to be made again for done.
        self.steps = {name: own for name, own in self.steps.items() if name not in self.lost} | {step: settings}
        self._write()

    def _write(self) -> None:
        if PartialState().is_main_process:
            write_artefact(self.path, self.steps)


def _defaults(options: type) -> dict[str, Any]:
    """The defaults of a dataclass, as they are written into a file."""
    fields = dataclasses.fields(options)
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return json.loads(
        json.dumps({f.name: f.default for f in fields if f.default is not dataclasses.MISSING} | made, default=str)
    )
