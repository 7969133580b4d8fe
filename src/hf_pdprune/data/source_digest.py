"""source_digest: tells the content of local data apart, whose name says nothing of it."""

import hashlib
from pathlib import Path

from .text_source import single_sources


def source_digest(source: str, split: str, subset: str | None = None) -> str | None:
    """
    Size and digest of the local files that [`load_text`] reads; `None` where it reads none (built-in text, the Hub).

    Args:
        source, split, subset: As for [`load_text`].
    """
    files = [path for name in single_sources(source, split, subset) if (path := Path(name).expanduser()).is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{sum(path.stat().st_size for path in files)} bytes, sha256 {digest.hexdigest()[:16]}"
