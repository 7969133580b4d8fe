"""The text that every Python carries: prose of its language reference and of its modules' docstrings."""

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


PYDOC_TOPICS = "pydoc-topics"
PYDOC_DOCSTRINGS = "pydoc-docstrings"

# Per cent of the names. A hash of its name decides where a topic or module goes, so that Python versions agree. The
# salt was picked by size alone: with it the shares also hold, within 2 %, for the characters of the topics in Python
# 3.10 to 3.13.
_SHARES = {"calibration": 20, "train": 60, "validation": 20}
_SALT = "297:"
_WORDS_PER_ROW = 400
# Shorter ones are mostly a name and its value.
_MIN_DOCSTRING_WORDS = 8
# The standard library, but for tests, and for packages whose text is the topics or another language's.
_LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings", "ensurepip", "pydoc_data"}


def topic_records(split: str) -> Iterator[tuple[str, dict]]:
    """The topics of a split: where each row stands, and the row."""
    _check_split(PYDOC_TOPICS, split)
    topics = _topics()
    paragraphs = {name: _prose(text) for name, text in topics.items()}
    # Topics quote each other at length. A paragraph belongs to the shortest one that has it, or splits would overlap.
    owner: dict[str, str] = {}
    for name in sorted(paragraphs, key=lambda name: (len(topics[name]), name)):
        for paragraph in paragraphs[name]:
            owner.setdefault(paragraph, name)
    for name in sorted(paragraphs):
        if _split_of(name) != split:
            continue
        own = [paragraph for paragraph in dict.fromkeys(paragraphs[name]) if owner[paragraph] == name]
        for number, text in enumerate(_groups(own), start=1):
            yield f"{PYDOC_TOPICS}, topic {name}, part {number}", {"text": text}


def docstring_records(split: str) -> Iterator[tuple[str, dict]]:
    """The modules of a split, read and not imported, in an order that mixes them: where each row stands, the row."""
    _check_split(PYDOC_DOCSTRINGS, split)
    folder = Path(sysconfig.get_path("stdlib"))
    modules = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in _module_files(folder)}
    if not modules:
        raise ValueError(f"{PYDOC_DOCSTRINGS}: this Python comes without the source of its modules")
    seen = {paragraph for text in _topics().values() for paragraph in _prose(text)}
    for name in sorted(modules, key=_digest):
        own = [
            paragraph
            for docstring in _docstrings(modules[name])
            for paragraph in _prose(docstring)
            if len(paragraph.split()) >= _MIN_DOCSTRING_WORDS
        ]
        # Modules quote each other too. All of them are gone through, so that a split does not depend on the others.
        own = [paragraph for paragraph in dict.fromkeys(own) if paragraph not in seen]
        seen.update(own)
        if _split_of(name) == split and own:
            for number, text in enumerate(_groups(own), start=1):
                yield f"{PYDOC_DOCSTRINGS}, module {name}, part {number}", {"text": text}


def _check_split(source: str, split: str) -> None:
    if split not in _SHARES:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(_SHARES)}")


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"{PYDOC_TOPICS}: this Python comes without pydoc_data") from error
    return topics


def _module_files(folder: Path) -> Iterator[Path]:
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if (folder / f"{name}.py").is_file():
            yield folder / f"{name}.py"
        for path in sorted((folder / name).rglob("*.py")):
            if not _LEFT_OUT.intersection(path.relative_to(folder).parts):
                yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, which are no modules
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _digest(name: str) -> int:
    return int(hashlib.sha256((_SALT + name).encode()).hexdigest(), 16)


def _split_of(name: str) -> str:
    point = _digest(name) % 100
    for split, share in _SHARES.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares add up to 100")


def _prose(text: str) -> list[str]:
    """Returns the paragraphs of a topic or docstring, one line each, without grammar, code and tables."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        # A line of one repeated sign underlines a heading.
        lines = [line for line in block.split("\n") if not re.fullmatch(r"\s*([*=~^\-])\1*\s*", line)]
        text = " ".join(" ".join(lines).split())
        if not text or "::=" in text or text.startswith((">>>", "...", "|", "+-")):
            continue
        # Code is indented, but so are lists, notes and what describes a method.
        if block.startswith(" ") and not re.match(r"\* |\d+\. ", text) and not _reads_like_prose(text):
            continue
        paragraphs.append(text)
    return paragraphs


def _reads_like_prose(text: str) -> bool:
    parts = text.split()
    words = [part for part in parts if re.fullmatch(r"[\"'(“*]*[A-Za-z][A-Za-z’'-]*[\"')”*.,:;?!]*", part)]
    return len(parts) >= 5 and len(words) >= 0.6 * len(parts) and text[-1] in '.:;!?)"”'


def _groups(paragraphs: list[str]) -> list[str]:
    """Joins paragraphs to texts of about equal length, some 200 to 600 words, in their order."""
    lengths = [len(paragraph.split()) for paragraph in paragraphs]
    total = sum(lengths)
    groups = [[] for _ in range(max(1, round(total / _WORDS_PER_ROW)))]
    before = 0
    for paragraph, length in zip(paragraphs, lengths, strict=True):
        # By its middle, a paragraph goes where most of it belongs.
        groups[int((before + length / 2) / total * len(groups))].append(paragraph)
        before += length
    return ["\n\n".join(group) for group in groups if group]
