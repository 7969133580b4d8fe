"""RowFile: results that cost much, one JSON line each, so that an interrupted run goes on with what is missing."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class RowFile:
    """
    Rows by their settings. A row is written as soon as it is known; one that was cut off by a kill counts as missing.

    Args:
        path (`str`): The file; made when the first row comes.
        write (`bool`, defaults to `True`): Whether rows are written; `False` in all processes but one.

    Raises:
        `ValueError`: If a line in the middle of the file is no row.

    Example:

    ```python
    rows = RowFile("outputs/ablation.jsonl")
    result = rows.get_or_make({"plan": digest, "task": "piqa"}, lambda: {"acc": 0.6})
    ```
    """

    def __init__(self, path: str | os.PathLike, write: bool = True):
        self.path = Path(path)
        self.write = write
        self._rows: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                self._rows[_key(row["settings"])] = row
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # the last line has no line feed after it: it was cut off
                    raise ValueError(f"{self.path}, line {number} is no row of results") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows in the order in which they came, each with `settings` and `result`."""
        return iter(self._rows.values())

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result for these settings, if there is one."""
        row = self._rows.get(_key(settings))
        return None if row is None else row["result"]

    def add(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """
        Keeps a result.

        Raises:
            `ValueError`: If a number is NaN or infinite.
        """
        row = {"settings": dict(settings), "result": dict(result)}
        text = json.dumps(row, allow_nan=False)
        self._rows[_key(settings)] = row
        if not self.write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_last_line(file)
            file.write(text.encode() + b"\n")

    def get_or_make(self, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result for these settings: the one that is there, or what `make()` gives, which is then kept."""
        if self.get(settings) is None:
            self.add(settings, make())
        return self.get(settings)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _drop_last_line(file: Any) -> None:
    """Cuts off what a kill has left of a line."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
