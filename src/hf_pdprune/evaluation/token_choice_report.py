"""Token choice report: which prompt tokens decode receives, compared, from token_choice.jsonl alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .result_table import ResultTable


TOKEN_CHOICE_FILE_NAME = "token_choice.jsonl"
TEXT = "text"


def token_choice_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """
    Lines of Markdown: for each run of the recipe that left rows, a table by task and one by depth.

    Args:
        rows (`Iterable[Mapping]`): Rows of [`RowFile`]: `settings` with `task`, `example` and what the run was of, and
            as `result` the scores by choice.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        # An example has its own settings: what is the same for all of a run is the rest.
        of_run = {key: value for key, value in row["settings"].items() if key not in ("task", "example")}
        runs.setdefault(json.dumps(of_run, sort_keys=True), []).append(row)
    lines = []
    for key, of_run in runs.items():
        settings = json.loads(key)
        lines += [
            f"Plan {settings['plan'][:8]}, {Path(settings['model']).name}, seed {settings['seed']}, "
            f"{len(of_run)} examples. KL to the dense model per token, and on text top-1 agreement, elsewhere right "
            "answers; all but the choice of all tokens have equal bytes, quantised ones fewer.",
            "",
            choice_table(choice_means(of_run)).to_markdown(),
            "",
        ]
        by_depth = choice_means([row for row in of_run if " " in row["settings"]["task"]], by_depth=True)
        if by_depth:
            lines += [
                "What is to be found, by its depth in the prompt (0: its beginning):",
                "",
                choice_table(by_depth).to_markdown(),
                "",
            ]
    return lines


def choice_means(rows: Sequence[Mapping[str, Any]], by_depth: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """
    Means by task and choice.

    Args:
        rows (`Sequence[Mapping]`): Rows of one run.
        by_depth (`bool`, defaults to `False`): Whether tasks like `needle 400 0.5` (kind, length, depth) are told
            apart by depth, of all lengths together; else all of a kind are one.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        task, *place = row["settings"]["task"].split(" ")
        groups.setdefault(f"{task}, depth {place[1]}" if by_depth and place else task, []).append(row["result"])
    return {
        task: {
            name: {key: sum(result[name][key] for result in results) / len(results) for key in results[0][name]}
            for name in results[0]
        }
        for task, results in groups.items()
    }


def choice_table(means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ResultTable:
    """One row per choice: KL and top-1 agreement on text, KL and right answers elsewhere."""
    table = ResultTable([["", *means]])
    for name in next(iter(means.values())):
        cells = []
        for task, by_name in means.items():
            second = by_name[name]["top1_agreement" if task == TEXT else "correct"]
            kl = max(by_name[name]["kl"], 0.0)  # of the same logits it may be rounded to less
            cells.append(f"{kl:.3f} / {second:.0%}")
        table.rows.append([name, *cells])
    return table
