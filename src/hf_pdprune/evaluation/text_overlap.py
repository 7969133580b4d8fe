"""TextOverlap: finds, by hash, texts that a model is evaluated on and was calibrated or distilled on."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


class TextOverlap:
    """
    Hashes of texts that a search or a training has seen. Upper and lower case and white space do not count, and a
    text counts as seen whether it was a row by itself, a prompt, or a prompt with its completion.

    Args:
        rows (`Iterable[Mapping]`): Rows as [`load_text`] gives them: `text`, or `prompt` and `completion`, or
            `messages`.

    Example:

    ```python
    seen = TextOverlap(load_text("data", "calibration", subset="piqa"))
    seen.count(questions)  # 0, one hopes
    ```
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._hashes: set[bytes] = set()
        self.add(rows)

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows of another source."""
        for row in rows:
            if "messages" in row:
                texts = [message["content"] for message in row["messages"]]
            elif "prompt" in row:
                texts = [row["prompt"], row["prompt"] + row["completion"]]
            else:
                texts = [row["text"]]
            self._hashes.update(text_hash(text) for text in texts)

    def count(self, texts: Iterable[str]) -> int:
        """How many of the texts were seen. Of a text of several paragraphs each one is looked up too."""
        return sum(
            any(text_hash(part) in self._hashes for part in (text, *text.split("\n\n")) if part.strip())
            for text in texts
        )


def text_hash(text: str) -> bytes:
    """SHA-256 of a text in lower case with single blanks."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
