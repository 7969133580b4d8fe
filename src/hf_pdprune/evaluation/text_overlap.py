"""TextOverlap: finds, by hash, texts that a model is evaluated on and was calibrated or distilled on."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


# A line or paragraph with fewer letters (a heading, "see also") is in many texts that have nothing else in common.
_LEAST_LETTERS = 40


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
        """How many of the texts were seen. Of a text of several paragraphs each one is looked up too, unless short."""
        return sum(any(text_hash(part) in self._hashes for part in _parts(text)) for text in texts)


def shown_text(row: Mapping[str, Any]) -> str:
    """
    What of a row that is evaluated must not have been seen: its text, its prompt, or the first message of its
    conversation. What many rows share does not count and is empty here: a system message, a short line of text.
    """
    if "messages" in row:
        return next((message["content"] for message in row["messages"] if message["role"] != "system"), "")
    if "text" in row:
        return "" if _is_short(row["text"]) else row["text"]
    return row["prompt"]


def text_hash(text: str) -> bytes:
    """SHA-256 of a text in lower case with single blanks."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def _parts(text: str) -> list[str]:
    """The text, and its paragraphs that are not short."""
    return [part for part in (text, *(part for part in text.split("\n\n") if not _is_short(part))) if part.strip()]


def _is_short(text: str) -> bool:
    return sum(letter.isalnum() for letter in text) < _LEAST_LETTERS
