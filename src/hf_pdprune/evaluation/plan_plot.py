"""Plan plot: redundancy per block, and under it what the plan does to each block."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..plan import PruningPlan
from .figures import new_figure, save_figure


_BAR, _KEPT, _REMOVED, _MERGED, _WINDOW, _NONE = "#8c9bab", "#dde3ea", "#c0392b", "#e6a23c", "#2f6fb0", "#ffffff"
_PROJECTED = "#d98880"


def plot_plan(plan: PruningPlan, redundancy: Sequence[float] | None, path: str | os.PathLike) -> Path:
    """
    Draws a plan as a PNG: the redundancy of every block as bars, and under them a row of squares each for prefill, for
    decode, and for what prefill hands over to decode.

    Args:
        plan ([`PruningPlan`]): The plan.
        redundancy (`Sequence[float]`, *optional*): Mean cosine similarity of each block's input and output.
        path (`str`): File to write.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If there is not one value per block.
    """
    total = plan.num_hidden_layers
    if redundancy is not None and len(redundancy) != total:
        raise ValueError(f"redundancy has {len(redundancy)} values, the plan is of {total} blocks")
    width = min(max(7.0, 2.2 + 0.3 * total), 24.0)
    figure = new_figure(width, 4.6 if redundancy is not None else 2.4)
    if redundancy is None:
        stages = figure.subplots()
    else:
        bars, stages = figure.subplots(2, sharex=True, height_ratios=(3, 1.5))
        _draw_bars(bars, plan, redundancy)
    _draw_stages(stages, plan)
    figure.suptitle(f"{Path(plan.base_model).name}: what each stage does without", fontsize=11)
    handles = _legend_handles(plan)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=8)
    return save_figure(figure, path)


def _draw_bars(axes, plan: PruningPlan, redundancy: Sequence[float]) -> None:
    colors = [_BAR if color == _KEPT else color for color in _stage_colors(plan, "decode")]
    # The first and the last block change almost everything; the axis shows what sets the others apart.
    low = math.floor(20 * (sorted(redundancy)[len(redundancy) // 10] - 0.02)) / 20
    low = min(max(low, 0.0), 0.9)
    axes.bar(range(len(redundancy)), redundancy, width=0.72, color=colors)
    axes.set_ylim(low, 1.0)
    for block, value in enumerate(redundancy):
        if value <= low:
            axes.annotate(f"{value:.2f}", (block, low), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    label = "redundancy\n(cosine similarity of\ninput and output)"
    axes.set_ylabel(label + (f"\naxis from {low:.2f}" if low > 0 else ""), fontsize=9)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _draw_stages(axes, plan: PruningPlan) -> None:
    from matplotlib.patches import Rectangle

    rows = {"prefill": _stage_colors(plan, "prefill"), "decode": _stage_colors(plan, "decode")}
    rows["KV handed over"] = _kv_colors(plan)
    for row, colors in enumerate(rows.values()):
        for block, color in enumerate(colors):
            axes.add_patch(
                Rectangle((block - 0.42, row - 0.38), 0.84, 0.76, facecolor=color, edgecolor="#9aa5b1", linewidth=0.6)
            )
    if plan.kv.block_windows:
        for block, window in plan.kv.windows.items():
            if block not in plan.decode.missing_blocks:
                axes.annotate(str(sum(window)), (block, 2), ha="center", va="center", fontsize=7, color="white")
    total = plan.num_hidden_layers
    axes.set_xlim(-0.7, total - 0.3)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, round(total / 40))
    axes.set_xticks(range(0, total, step), [str(block) for block in range(0, total, step)])
    axes.set_xlabel("block of the dense model", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _stage_colors(plan: PruningPlan, name: str) -> list[str]:
    colors = [_KEPT] * plan.num_hidden_layers
    stage = plan.stage(name)
    for block in stage.removed_blocks:
        colors[block] = _REMOVED
    for _, absorbed in stage.merged_blocks:
        colors[absorbed] = _MERGED
    for block in stage.projected_blocks:
        colors[block] = _PROJECTED
    return colors


def _kv_colors(plan: PruningPlan) -> list[str]:
    missing = plan.decode.missing_blocks
    return [
        _NONE if block in missing else _WINDOW if block in plan.kv.token_aware_blocks else _KEPT
        for block in range(plan.num_hidden_layers)
    ]


def _legend_handles(plan: PruningPlan) -> list:
    from matplotlib.patches import Patch

    labels = {_KEPT: "kept / KV of all prompt tokens", _REMOVED: "removed"}
    if plan.prefill.merged_blocks or plan.decode.merged_blocks:
        labels[_MERGED] = "merged into its neighbour"
    if plan.prefill.projected_blocks:
        labels[_PROJECTED] = "only keys and values computed"
    if plan.kv.token_aware_blocks:
        text = plan.kv.to_text() if not plan.kv.block_windows else "so many prompt tokens"
        labels[_WINDOW] = f"token-aware: KV of {text}"
    labels[_NONE] = "no KV"
    return [Patch(facecolor=color, edgecolor="#9aa5b1", label=label) for color, label in labels.items()]
