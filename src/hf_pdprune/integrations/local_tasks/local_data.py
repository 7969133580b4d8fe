"""Local data: the functions that the task files beside it name; each reads JSON lines from a folder."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import yaml
from datasets.exceptions import DatasetGenerationError


FOLDER_VARIABLE = "HF_PDPRUNE_DATA"
EVALUATION, FEWSHOT = "evaluation", "fewshot"
_FEWSHOT_PART = "calibration"


def load_local_data(
    file: str, data_folder: str | None = None, data_split: str = "validation", **_: Any
) -> dict[str, datasets.Dataset]:
    """
    The rows of one task. lm-eval calls it with what its task file and the task manager's metadata say:

        TaskManager(include_path=..., metadata={"data_folder": "data", "data_split": "validation"})

    Args:
        file (`str`): The task's name in the folder: `<file>.<data_split>.jsonl`.
        data_folder (`str`, *optional*): The folder. Default: the one that `HF_PDPRUNE_DATA` names.
        data_split (`str`, defaults to `"validation"`): Which part is evaluated.

    Returns:
        `dict[str, datasets.Dataset]`: `evaluation`, and `fewshot`: the rows of the calibration part beside it that are
        not evaluated. None, where the folder has no such part or it is the one that is evaluated.

    Raises:
        `FileNotFoundError`: If there is no folder or no such file.
        `ValueError`: If the file has no rows, or a file is not made of JSON lines.
    """
    folder = data_folder or os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise FileNotFoundError(
            f"local tasks read a folder: name it in the metadata (data_folder) or in {FOLDER_VARIABLE}"
        )
    path = Path(folder) / f"{file}.{data_split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {folder}")
    evaluated = _rows(path)
    if len(evaluated) == 0:
        raise ValueError(f"{path} has no rows")
    shots = datasets.Dataset.from_list([])
    path = shots_file(folder, file)
    if path.is_file() and data_split != _FEWSHOT_PART:
        seen = {_shown(row) for row in evaluated}
        shots = _rows(path)
        shots = shots.select([number for number, row in enumerate(shots) if _shown(row) not in seen])
    return {EVALUATION: evaluated, FEWSHOT: shots}


def _rows(path: Path) -> datasets.Dataset:
    if not path.read_bytes().strip():  # datasets has an error of its own for that
        return datasets.Dataset.from_list([])
    try:
        return datasets.Dataset.from_json(str(path), keep_in_memory=True)
    except DatasetGenerationError as error:
        reason = (str(error.__cause__).strip() or type(error.__cause__).__name__).splitlines()[0]
        raise ValueError(f"{path} is not made of JSON lines: {reason}") from error


def shots_file(folder: str | os.PathLike, file: str) -> Path:
    """Where the worked examples of a task come from."""
    return Path(folder) / f"{file}.{_FEWSHOT_PART}.jsonl"


def _shown(row: Mapping[str, Any]) -> str:
    """What a model reads of a row, by which a row is recognised in another part."""
    return " ".join(f"{row.get('question') or row.get('text')}".lower().split())


def mmlu_text(doc: Mapping[str, Any]) -> str:
    """The question under the line that lm-eval's MMLU puts above it."""
    subject = doc["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n{doc['question']}"


def cmmlu_text(doc: Mapping[str, Any]) -> str:
    """The question under the line, with the subject's Chinese name, that lm-eval's CMMLU puts above it."""
    path = Path(lm_eval.__file__).parent / "tasks" / "cmmlu" / f"cmmlu_{doc['subject']}.yaml"
    if path not in _CMMLU_LINES:
        _CMMLU_LINES[path] = yaml.safe_load(path.read_text(encoding="utf-8"))["description"]
    return _CMMLU_LINES[path] + doc["question"]


_CMMLU_LINES: dict[Path, str] = {}


def winogrande_text(doc: Mapping[str, Any]) -> int:
    """Which of the choices is the right context; lm-eval takes a number for that."""
    return doc["answer"]


def winogrande_target(doc: Mapping[str, Any]) -> str:
    """The rest of the sentence, which is scored after each choice."""
    return doc["question"].split("_", 1)[1].strip()


def winogrande_choice(doc: Mapping[str, Any]) -> list[str]:
    """The sentence up to the blank, each option filled in."""
    return [doc["question"].split("_", 1)[0] + option for option in doc["choices"]]


def wikitext_articles(rows: datasets.Dataset) -> datasets.Dataset:
    """Paragraphs in order -> a row `page` per article, as lm-eval's WikiText has them."""
    return datasets.Dataset.from_list([{"page": "\n\n".join(texts)} for texts in _articles(rows["text"])])


def _articles(texts: Any) -> Iterator[list[str]]:
    article: list[str] = []
    for text in texts:
        if article and re.match(r"\s*= [^=]", text):  # a heading of first order; those of others have more signs
            yield article
            article = []
        article.append(text)
    yield article
