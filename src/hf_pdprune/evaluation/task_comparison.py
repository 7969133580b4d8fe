"""TaskComparison: accuracies of a pair of stages beside the dense model's, compared row by row."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


# The first of these that a task has is the one that tables show. Of perplexities less is better.
_MAIN_METRICS = ("acc", "exact_match (flexible-extract)", "exact_match", "word_perplexity", "perplexity")


def compare_tasks(
    dense: Mapping[str, Mapping[str, Any]], pruned: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """
    Tasks that both models were evaluated on.

    Args:
        dense (`Mapping`): By task what [`TaskEvaluation.run`] gives for the dense model.
        pruned (`Mapping`): The same for the pair.

    Returns:
        `dict[str, dict]`: By task `metric`, the name of the main metric; its value for `dense` and `pruned`;
        `difference` (pruned - dense) and its standard error over rows (`difference_stderr`, `None` where the metric
        is not a mean over rows); `rows`, their number; and `all`, every metric of both.

    Raises:
        `ValueError`: If the two were evaluated on different rows.
    """
    compared = {}
    for task in dense:
        if task not in pruned:
            continue
        one, other = dense[task], pruned[task]
        if one["rows"] != other["rows"]:
            raise ValueError(
                f"{task}: the dense model was evaluated on {one['rows']} rows, the pair on {other['rows']}"
            )
        metric = main_metric(one["metrics"])
        values = {name: part["metrics"][metric] for name, part in (("dense", one), ("pruned", other))}
        by_row = [part["per_row"].get(metric) for part in (one, other)]
        compared[task] = {
            "metric": metric,
            **values,
            "difference": values["pruned"] - values["dense"],
            "difference_stderr": None if None in by_row else paired_stderr(*by_row),
            "rows": one["rows"],
            "all": {"dense": dict(one["metrics"]), "pruned": dict(other["metrics"])},
        }
    return compared


def main_metric(metrics: Mapping[str, float]) -> str:
    """Name of the metric that tables show."""
    return next((name for name in _MAIN_METRICS if name in metrics), next(iter(metrics)))


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers, of which a mean over tasks can be taken."""
    return metric.startswith(("acc", "exact_match"))


def paired_stderr(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of the mean difference of two models on the same rows; `None` for a single row."""
    differences = [second - first for first, second in zip(one, other, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def mean_accuracy(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """
    Mean over the tasks whose metric is a share of right answers.

    Returns:
        `dict[str, float]`: `dense`, `pruned`, their `difference` and its `difference_stderr` (tasks being
        independent), and `tasks`, their number. `None` where there is no such task.
    """
    tasks = [part for part in compared.values() if is_accuracy(part["metric"])]
    if not tasks:
        return None
    errors = [part["difference_stderr"] or 0.0 for part in tasks]
    means = {name: statistics.fmean(part[name] for part in tasks) for name in ("dense", "pruned", "difference")}
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(tasks)
    return {**means, "difference_stderr": stderr, "tasks": len(tasks)}


def accuracies_and_others(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    What one model's tasks come to.

    Args:
        results (`Mapping`): By task what [`TaskEvaluation.run`] gives.

    Returns:
        `dict[str, Any]`: `accuracy`: the mean over the tasks that have one, its standard error `stderr`, and each
        task's value in `tasks`; `other_tasks`: metric and value of the others. Each only where there are such tasks.
    """
    accuracies, errors, others = {}, [], {}
    for task, result in results.items():
        metric = main_metric(result["metrics"])
        value = result["metrics"][metric]
        if is_accuracy(metric):
            accuracies[task] = value
            errors.append(result["stderr"].get(metric, 0.0))
        else:
            others[task] = {"metric": metric, "value": value}
    parts: dict[str, Any] = {}
    if accuracies:
        stderr = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        parts["accuracy"] = {"mean": statistics.fmean(accuracies.values()), "stderr": stderr, "tasks": accuracies}
    if others:
        parts["other_tasks"] = others
    return parts
