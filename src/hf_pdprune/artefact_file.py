"""Artefact files: written as a whole or not at all, and read with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any


def write_artefact(path: str | os.PathLike, content: Any) -> Path:
    """
    Writes a text, bytes, or anything else as JSON, to a file; what was there before stays there until all is written.

    Args:
        path (`str` or `os.PathLike`): The file. Its folder is made if need be.
        content (`str`, `bytes` or what JSON holds): The content.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: If a number is NaN or infinite, which JSON cannot hold.
        `OSError`: If it cannot be written.
    """
    path = Path(path)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, indent=2, allow_nan=False) + "\n"
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds. Raises a `ValueError` that names the file where it is not valid."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
