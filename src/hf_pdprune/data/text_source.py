"""Text for calibration, distillation and evaluation: one function, whatever the text comes from."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import datasets

from .python_text import PYDOC_DOCSTRINGS, PYDOC_TOPICS, docstring_records, topic_records


logger = logging.getLogger(__name__)

_ACCEPTED = (
    "'text'; 'prompt' and 'completion'; 'question', 'choices' and 'answer' (index of the right choice); "
    "'question' and 'answer' (text); 'messages'; or any column named by text_column"
)
_BUILT_IN = {PYDOC_TOPICS: topic_records, PYDOC_DOCSTRINGS: docstring_records}
_TEXT, _PAIR = ("text",), ("prompt", "completion")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_text(
    source: str,
    split: str,
    *,
    subset: str | None = None,
    text_column: str | None = None,
    max_rows: int | None = None,
) -> datasets.Dataset:
    """
    Loads text as a data set with either a column `text` or the columns `prompt` and `completion`.

    Rows may come with these columns (others are dropped): `text`; `prompt` and `completion`; `question`, `choices` and
    `answer`, the index of the right choice, which becomes the completion after a space; `question` and `answer`, a
    text, likewise; and where none of these is there, `messages`, which is kept as it is.

    Args:
        source (`str`):
            Where the text comes from:

            - `"pydoc-topics"`: the English prose of Python's own language reference, which needs no network. A topic,
              and a paragraph that several topics share, is in one split only;
            - `"pydoc-docstrings"`: the prose in the docstrings of Python's own modules, several times as much. A
              module is in one split only, and no paragraph of a topic is in any;
            - a `.jsonl` or `.json` file (`split` is ignored);
            - a folder with files `<split>.jsonl` or `<name>.<split>.jsonl`;
            - else the id of a data set on the Hub.

            Several of them joined by commas give their rows in turn, as long as they last. Where some give `text` and
            others `prompt` and `completion`, these are joined to a `text` as well.
        split (`str`):
            Part of the data set. Python's own texts have `calibration`, `train` and `validation`.
        subset (`str`, *optional*):
            Configuration of a Hub data set. In a folder, the `<name>` of the file to read.
        text_column (`str`, *optional*):
            Column to use as `text`, whatever else there is.
        max_rows (`int`, *optional*):
            Rows to keep, from the first on. All by default.

    Returns:
        `datasets.Dataset`: with the columns `text`, or `prompt` and `completion`, or `messages`.

    Raises:
        `FileNotFoundError`: if a local path is missing or a folder has no file for the split.
        `ValueError`: if the source cannot be loaded or holds no rows, broken JSON, an empty text or unknown columns.
            On the Hub, where rows with an empty text are common, they are left out instead.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, found {max_rows}")
    names = _joined(source)
    rows = _interleave({name: _source_rows(name, split, subset, text_column, max_rows) for name in names})
    return datasets.Dataset.from_list(rows[:max_rows])


def single_sources(source: str, split: str, subset: str | None = None) -> list[str]:
    """
    What [`load_text`] would read, one by one: the names that commas join, and the files of a folder. Read by itself,
    each keeps its columns.

    Raises:
        As [`load_text`], where a name is empty or a folder has no file for the split.
    """
    names = []
    for name in _joined(source):
        path = Path(name).expanduser()
        names += map(str, _split_files(path, split, subset)) if path.is_dir() else [name]
    return names


def public_name(source: str) -> str:
    """What a source is called in artefacts, which others read: of a path its last part alone."""
    paths = {name: Path(name).expanduser() for name in _joined(source)}
    return ",".join(path.resolve().name if path.exists() else name for name, path in paths.items())


def _joined(source: str) -> list[str]:
    # A path may contain a comma.
    names = [source] if Path(source).expanduser().exists() else [part.strip() for part in source.split(",")]
    if not all(names):
        raise ValueError(f"source {source!r} holds an empty name")
    return names


def _source_rows(
    source: str, split: str, subset: str | None, text_column: str | None, limit: int | None
) -> list[dict]:
    path = Path(source).expanduser()
    if source in _BUILT_IN:
        return _to_rows(source, _BUILT_IN[source](split), text_column, limit)
    if path.is_dir():
        files = _split_files(path, split, subset)
        return _interleave({str(file): _to_rows(str(file), _records(file), text_column, limit) for file in files})
    if path.suffix in (".json", ".jsonl") or not _HUB_ID.fullmatch(source):
        if not path.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        if path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{source}: only .jsonl and .json files can be read")
        return _to_rows(source, _records(path), text_column, limit)
    return _to_rows(source, _hub_records(source, split, subset), text_column, limit, skip_empty=True)


def _interleave(parts: dict[str, list[dict]]) -> list[dict]:
    """
    Takes one row of each part in turn, so that the first rows are equally many of each; those of the longer parts that
    are left come last.
    """
    columns = {name: tuple(rows[0]) for name, rows in parts.items()}
    if set(columns.values()) == {_TEXT, _PAIR}:
        pairs = [name for name, names in columns.items() if names == _PAIR]
        logger.warning("beside plain text, prompt and completion become one text: %s", ", ".join(pairs))
        for name in pairs:
            parts[name] = [{"text": row["prompt"] + row["completion"]} for row in parts[name]]
    elif len(set(columns.values())) > 1:
        found = "; ".join(f"{name} gives {', '.join(names)}" for name, names in columns.items())
        raise ValueError(f"sources that are joined must give the same columns: {found}")
    return [row for group in zip_longest(*parts.values()) for row in group if row is not None]


def _to_rows(
    name: str,
    records: Iterable[tuple[str, object]],
    text_column: str | None,
    limit: int | None,
    skip_empty: bool = False,
) -> list[dict]:
    """Brings records, each with a description of where it stands, to the columns that `load_text` promises."""
    rows = []
    for where, record in records:
        if len(rows) == limit:
            break
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a row must be a JSON object, found {type(record).__name__}")
        row = _to_row(where, record, text_column)
        empty = [column for column, value in row.items() if not value or isinstance(value, str) and not value.strip()]
        if empty and skip_empty:
            continue
        if empty:
            raise ValueError(f"{where}: {empty[0]} is empty")
        if rows and row.keys() != rows[0].keys():
            raise ValueError(f"{where}: gives {', '.join(row)}, but the rows before it give {', '.join(rows[0])}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{name}: no rows" + (" with a text that is not empty" if skip_empty else ""))
    return rows


def _to_row(where: str, record: dict, text_column: str | None) -> dict:
    if text_column is not None:
        if text_column not in record:
            raise ValueError(f"{where}: no column {text_column!r}, found: {_names(record)}")
        return {"text": _text(where, text_column, record[text_column])}
    if "text" in record:
        return {"text": _text(where, "text", record["text"])}
    if "prompt" in record and "completion" in record:
        return {column: _text(where, column, record[column]) for column in ("prompt", "completion")}
    if "question" in record and "answer" in record:
        prompt, answer, choices = _text(where, "question", record["question"]), record["answer"], record.get("choices")
        if choices is not None:
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"{where}: choices must be a list of texts, found {choices!r:.60}")
            if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
                raise ValueError(
                    f"{where}: answer must be an index from 0 to {len(choices) - 1}, found {answer!r:.60}"
                )
            answer = _text(where, f"choices[{answer}]", choices[answer])
        answer = _text(where, "answer", answer)
        # An empty answer stays empty, to be found as such.
        return {"prompt": prompt, "completion": answer and " " + answer}
    if "messages" in record:
        return {"messages": _messages(where, record["messages"])}
    raise ValueError(f"{where}: columns not understood: {_names(record)}; accepted: {_ACCEPTED}")


def _names(record: dict) -> str:
    return ", ".join(map(repr, record)) or "none"


def _text(where: str, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be a text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half a surrogate pair, which neither tokenizers nor Arrow take.
        raise ValueError(f"{where}: {column} holds a character that is not Unicode text: {error.reason}") from error
    return value


def _messages(where: str, messages: object) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages must be a list of objects with 'role' and 'content'")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            _text(where, f"messages[{number}].{key}", message.get(key))
    return messages


def _split_files(folder: Path, split: str, subset: str | None) -> list[Path]:
    ending = f"{split}.jsonl" if subset is None else f"{subset}.{split}.jsonl"
    files = sorted(file for file in folder.iterdir() if file.name == ending or file.name.endswith("." + ending))
    if not files:
        found = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "no .jsonl file"
        prefix = "*." if subset is None else ""
        raise FileNotFoundError(f"{folder}: no file {prefix}{ending}, found: {found:.300}")
    return files


def _records(path: Path) -> Iterator[tuple[str, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, see byte {error.start}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
        yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))
        return
    # Not splitlines(): JSON strings may contain its other line ends, such as U+2028, unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
        yield where, record


def _hub_records(source: str, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # what it raises depends on the data set, the network and the file format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        built_in = " nor ".join(map(repr, _BUILT_IN))
        raise ValueError(
            f"data set {source!r} is neither {built_in} nor a local path, and the Hub does not give its split "
            + repr(split)
            + (f" of subset {subset!r}" if subset is not None else "")
            + f": {reason}"
        ) from error
    for number, record in enumerate(dataset):
        yield f"data set {source!r}, row {number}", record
