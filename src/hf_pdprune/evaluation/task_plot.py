"""Task plot: per task the dense model's share of right answers and the pair's, as two points on a line."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import new_figure, save_figure
from .task_comparison import is_accuracy


_DENSE, _PRUNED = "#33475b", "#c0392b"


def plot_tasks(tasks: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> Path | None:
    """
    Draws the accuracies of both models as a PNG; the bar on the pair's point is the standard error of the difference.

    Args:
        tasks (`Mapping`): What [`compare_tasks`] gives.
        path (`str`): File to write.

    Returns:
        `Path`: The file, or `None` where no task has an accuracy.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    shown = {name: part for name, part in tasks.items() if is_accuracy(part["metric"])}
    if not shown:
        return None
    figure = new_figure(7.0, 1.5 + 0.34 * len(shown))
    axes = figure.subplots()
    for row, part in enumerate(shown.values()):
        dense, pruned = 100 * part["dense"], 100 * part["pruned"]
        error = 100 * (part.get("difference_stderr") or 0.0)
        axes.plot([dense, pruned], [row, row], color="#b8c2cc", linewidth=2, zorder=1)
        axes.errorbar(pruned, row, xerr=error, color=_PRUNED, fmt="o", markersize=6, capsize=2, linewidth=1, zorder=2)
        axes.plot(dense, row, "o", color=_DENSE, markersize=6, zorder=3)
    axes.plot([], [], "o", color=_DENSE, label="dense")
    axes.plot([], [], "o", color=_PRUNED, label="pruned (bar: standard error of the difference)")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("right answers (%)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return save_figure(figure, path)
