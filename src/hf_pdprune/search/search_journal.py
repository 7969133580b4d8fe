"""SearchJournal: every energy that a search has measured, on disk, so that an interrupted search loses nothing."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..artefact_file import write_artefact


logger = logging.getLogger(__name__)


class SearchJournal:
    """
    A file of lines, one for every round (a batch of each process) on which a plan was measured, flushed one by one.
    The first line says of what model and calibration they are, and of how many processes. A search that is started
    again with the same journal is the same search: it draws the same random numbers, takes known energies from the
    journal instead of computing them, and so arrives where it was interrupted, with its random generator in the state
    in which it was.

    Where several processes run, the main one alone reads and writes the file, and the others learn from it what is
    known: none may know more than another one, or they would not measure the same plans together.

    Args:
        path (`str` or `os.PathLike`, *optional*): The file. Without one nothing is written.
        subject (`str`): Digest of the model and calibration on which the energies are measured, see
            [`Calibration.round_digest`].

    Raises:
        `ValueError`: If the file is a journal of another subject, or no journal.
    """

    def __init__(self, path: str | os.PathLike | None, subject: str):
        self.path = None if path is None else Path(path)
        self.subject = subject
        self._entries: dict[tuple[str, int], float] = {}
        self._writes = self.path is not None and PartialState().is_main_process
        if self.path is not None:
            self._open()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, plan: str, batch: int) -> float | None:
        """The sum of KL that was measured of a plan (its digest) in a round."""
        return self._entries.get((plan, batch))

    def add(self, plan: str, batch: int, kl_sum: float) -> None:
        """Records what was measured of a plan in a round."""
        self._entries[plan, batch] = kl_sum
        if self._writes:
            self._append({"plan": plan, "batch": batch, "kl_sum": kl_sum})

    def _open(self) -> None:
        """The main process reads the file, or begins one; all processes then know the same, or raise the same."""
        shared: list[Any] = [{}, None]
        if self._writes:
            try:
                if self.path.is_file():
                    self._read()
                else:  # as a whole: of half a line nobody could tell that it is a journal
                    write_artefact(self.path, json.dumps({"subject": self.subject}) + "\n")
            except (ValueError, OSError) as error:
                shared[1] = error
            shared[0] = self._entries
        if PartialState().num_processes > 1:
            shared = broadcast_object_list(shared)
        self._entries, error = shared
        if error is not None:
            raise error

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        try:
            complete, _, torn = self.path.read_text(encoding="utf-8").rpartition("\n")
            header, *lines = [json.loads(line) for line in complete.split("\n")]
            subject = header["subject"]
            for line in lines:
                self._entries[line["plan"], line["batch"]] = line["kl_sum"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a search journal: {error!r}") from error
        if subject != self.subject:
            raise ValueError(
                f"{self.path} is the journal of a search with another model, calibration set or number of processes; "
                "remove it, or choose another output folder"
            )
        if torn:  # the process was killed while it wrote this line
            with self.path.open("r+", encoding="utf-8") as file:
                file.truncate(len((complete + "\n").encode()))
        logger.info("%s: %d energies are known already", self.path, len(self._entries))
