"""TaskEvaluation: tasks of lm-eval, on local data or from the Hub, one after the other on any model of lm-eval."""

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.model import LM, CachingLM
from lm_eval.tasks import TaskManager

from .local_tasks import LOCAL_TASKS_FOLDER
from .local_tasks.local_data import FEWSHOT, load_local_data, shots_file


logger = logging.getLogger(__name__)

LOCAL_PREFIX = "local_"
_SEED = 1234


class TaskEvaluation:
    """
    Tasks by the names that people use (`piqa`, `mmlu`, `gsm8k`, ...). With a folder, those for which the library has
    a task file read their rows from there, and need no network; all others are lm-eval's own, from the Hub. A tag of
    lm-eval's (`glue`, `ai2_arc`) stands for its tasks, since it has no result of its own.

    Args:
        tasks (`Sequence[str]`): Names.
        data_folder (`str`, *optional*): Folder with `<task>.<data_split>.jsonl`.
        data_split (`str`, defaults to `"validation"`): Which part is evaluated.
        num_fewshot (`int`, *optional*): Worked examples before each question. Default: as each task says. With a
            folder they are the first rows of `<task>.calibration.jsonl` that are not evaluated.

    Attributes:
        tasks (`list[str]`): The names, tags replaced by those of their tasks.

    Raises:
        `FileNotFoundError`: If the folder is missing.
        `ValueError`: If a task is unknown, named twice, or a group of tasks that has no result of its own; if the
            folder does not hold `num_fewshot` worked examples of a task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        data_folder: str | os.PathLike | None = None,
        data_split: str = "validation",
        num_fewshot: int | None = None,
    ):
        self.data_folder = None if data_folder is None else Path(data_folder)
        self.data_split = data_split
        self.num_fewshot = num_fewshot
        if self.data_folder is not None and not self.data_folder.is_dir():
            raise FileNotFoundError(f"data_folder: no folder {data_folder}")
        if num_fewshot is not None and num_fewshot < 0:
            raise ValueError(f"num_fewshot must be at least 0, got {num_fewshot}")
        twice = [name for name in tasks if list(tasks).count(name) > 1]
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice")
        known = {path.stem.removeprefix(LOCAL_PREFIX) for path in LOCAL_TASKS_FOLDER.glob(f"{LOCAL_PREFIX}*.yaml")}
        local = known if self.data_folder else set()
        metadata = {"data_folder": str(self.data_folder), "data_split": data_split}
        # Reading the names of all of lm-eval's own tasks takes seconds.
        self._manager = TaskManager(
            include_path=str(LOCAL_TASKS_FOLDER), include_defaults=not local.issuperset(tasks), metadata=metadata
        )
        for name in tasks:
            if name not in local and name not in self._manager.all_tasks:
                raise ValueError(f"tasks: unknown task {name!r}; on local data there are {', '.join(sorted(known))}")
        # A task may be there both by its name and by a tag.
        parts = ([name] if name in local else self._parts_of(name) for name in tasks)
        self.tasks = list(dict.fromkeys(part for names in parts for part in names))
        self._names = {name: LOCAL_PREFIX + name if name in local else name for name in self.tasks}
        self._loaded: dict[str, dict[str, Any]] = {}
        missing = self.missing()
        for name in self.tasks:
            if num_fewshot and name not in missing and (reason := self._missing_shots(name)):
                raise ValueError(f"num_fewshot: {name}: {reason}")

    def _parts_of(self, name: str) -> list[str]:
        """The tasks, or groups with a result of their own, that a name of lm-eval's stands for."""
        entry = self._manager.task_index[name]
        if name in self._manager.all_tags:
            return sorted(entry.tags)
        if name in self._manager.all_groups and not entry.cfg.get("aggregate_metric_list"):
            members = (
                part if isinstance(part, str) else part.get("group", part.get("task")) for part in entry.cfg["task"]
            )
            raise ValueError(f"tasks: {name!r} has no result of its own; name those of {', '.join(members)}")
        return [name]

    def file_of(self, task: str) -> Path | None:
        """The file from which a task reads its rows; `None` for one from the Hub."""
        if self._names[task] == task:
            return None
        return self.data_folder / f"{task}.{self.data_split}.jsonl"

    def shots_file_of(self, task: str) -> Path | None:
        """The file from which a task reads its worked examples; `None` for one without them, or from the Hub."""
        return shots_file(self.data_folder, task) if self._local_shots(task) else None

    def missing(self) -> dict[str, str]:
        """Tasks whose data are not there, with the reason: they are to be named and left out, not counted as zero."""
        missing = {}
        for task in self.tasks:
            file = self.file_of(task)
            if file is not None and not file.is_file():
                missing[task] = f"no {file.name} in {self.data_folder}"
            elif self.num_fewshot is None and (reason := self._missing_shots(task)):
                missing[task] = reason
        return missing

    def _local_shots(self, task: str) -> int:
        """How many worked examples a task needs of the folder."""
        if self._names[task] == task:
            return 0
        default = self._manager.task_index[self._names[task]].cfg.get("num_fewshot")
        return (default if self.num_fewshot is None or default == 0 else self.num_fewshot) or 0

    def _missing_shots(self, task: str) -> str | None:
        """Why a task cannot have its worked examples, if it cannot."""
        shots = self._local_shots(task)
        if shots == 0:
            return None
        file = shots_file(self.data_folder, task)
        if not file.is_file():
            return f"no {file.name} in {self.data_folder} for {shots} worked examples"
        there = len(load_local_data(task, str(self.data_folder), self.data_split)[FEWSHOT])
        if there < shots:
            return f"{file.name} has {there} rows that are not evaluated, too few for {shots} worked examples"
        return None

    def texts(self, task: str, limit: int | None = None) -> list[str]:
        """What the task shows to a model, one text per row: what must not have been calibrated or trained on."""
        texts = []
        for loaded in self._load(task)["tasks"].values():
            for doc in list(loaded.test_docs() if loaded.has_test_docs() else loaded.validation_docs())[:limit]:
                texts.append(str(doc.get("page") or doc.get("text") or doc.get("question") or loaded.doc_to_text(doc)))
        return texts

    def run(
        self, lm: LM, task: str, limit: int | None = None, cache: str | os.PathLike | None = None
    ) -> dict[str, Any] | None:
        """
        Evaluates one task.

        Args:
            lm (`lm_eval.api.model.LM`): The model.
            task (`str`): One of the names.
            limit (`int`, *optional*): Rows to use, from the first on.
            cache (`str`, *optional*): File for the answers to single requests, by which an interrupted task goes on.

        Returns:
            `dict`: `metrics` and `stderr` by name, `rows`, `num_fewshot`, and `per_row`, the metrics of single rows
            by which two models can be compared in pairs. `None` in all processes but the main one.
        """
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(_SEED)
        name = self._names[task]
        if cache is not None:
            Path(cache).parent.mkdir(parents=True, exist_ok=True)
            lm = CachingLM(lm, f"{cache}.rank{lm.rank}.db")
        results = evaluate(lm, self._load(task), limit=limit, bootstrap_iters=1000, log_samples=True)
        if results is None:
            return None
        row = results["results"].get(name) or results.get("groups", {})[name]
        metrics, errors = {}, {}
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if not filtered or not isinstance(value, int | float):
                continue
            kept = errors if metric.endswith("_stderr") else metrics
            metric = metric.removesuffix("_stderr")
            kept[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
        return {
            "metrics": metrics,
            "stderr": {metric: error for metric, error in errors.items() if metric in metrics},
            "rows": sum(counts["effective"] for counts in results["n-samples"].values()),
            "num_fewshot": results["n-shot"].get(name),
            "per_row": _per_row(results["samples"]),
        }

    def _load(self, task: str) -> dict[str, Any]:
        if task not in self._loaded:
            loaded = self._manager.load([self._names[task]])
            for part in loaded["tasks"].values():
                default = part.get_config("num_fewshot")
                if default == 0 and self.num_fewshot:
                    logger.warning("%s takes no worked examples: num_fewshot does not apply", part.task_name)
                if default is None or (self.num_fewshot is not None and default != 0):
                    part.set_config(key="num_fewshot", value=self.num_fewshot or 0)
                part.set_fewshot_seed(seed=_SEED)
            self._loaded[task] = loaded
        return self._loaded[task]


def _per_row(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Metrics that each row has by itself, in the order of rows."""
    rows: dict[str, list[float]] = {}
    for part in samples.values():
        for sample in sorted(part, key=lambda sample: (sample["filter"], sample["doc_id"])):
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    key = metric if sample["filter"] == "none" else f"{metric} ({sample['filter']})"
                    rows.setdefault(key, []).append(float(sample[metric]))
    return rows
