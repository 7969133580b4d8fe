"""Speed plot: TTFT and TPOT over the prompt length, and the share of time saved beside what was removed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import new_figure, save_figure


_COLORS = ("#33475b", "#2f6fb0", "#3c9d8f", "#e6a23c", "#c0392b", "#8e5ea2")


def plot_speed(cases: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """
    Draws what [`SpeedBenchmark`] measured: above, the times of the dense model (dashed) and the pair over the prompt
    length, a colour per batch size; below, for each case the share of time saved beside the limit's share removed
    (FLOPs for prefill, bytes for decode).

    Args:
        cases (`Sequence[Mapping]`): `cases` of its result.
        path (`str`): File to write.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure = new_figure(9.0, 6.2)
    from matplotlib.ticker import FuncFormatter, LogLocator

    batches = sorted({case["batch_size"] for case in cases})
    lengths = sorted({case["prompt_tokens"] for case in cases})
    above, below = figure.subplots(2, 2, height_ratios=(1.2, 1))
    for axes, what, title in ((above[0], "ttft", "time to first token"), (above[1], "tpot", "time per output token")):
        for color, rows in zip(_COLORS * len(batches), batches, strict=False):
            own = sorted((case for case in cases if case["batch_size"] == rows), key=lambda c: c["prompt_tokens"])
            x = [case["prompt_tokens"] for case in own]
            for name, style in (("dense", "--"), ("pruned", "-")):
                median = [1000 * case[what][name]["median"] for case in own]
                low, high = zip(*(case[what][name]["quartiles"] for case in own), strict=True)
                label = f"batch {rows}" if name == "pruned" else None
                axes.plot(x, median, style, color=color, marker="o", markersize=4, linewidth=1.4, label=label)
                axes.fill_between(x, [1000 * v for v in low], [1000 * v for v in high], color=color, alpha=0.12)
        axes.plot([], [], "--", color="#777777", label="dense")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("prompt tokens", fontsize=9)
        axes.set_ylabel("ms (log scale)", fontsize=9)
    handles, names = above[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    labels = [f"{case['prompt_tokens']:,} × {case['batch_size']}" for case in cases]
    for axes, what, limit, noun in (
        (below[0], "ttft", "prefill_flops", "FLOPs"),
        (below[1], "tpot", "decode_bytes", "bytes read"),
    ):
        place = range(len(cases))
        saved = [100 * (1 - case[what]["ratio"]) for case in cases]
        removed = [100 * case["roofline"][f"{limit}_removed"] for case in cases]
        axes.bar([x - 0.2 for x in place], removed, width=0.38, color="#c3ccd6", label=f"{noun} removed")
        axes.bar([x + 0.2 for x in place], saved, width=0.38, color="#2f6fb0", label="time saved")
        axes.axhline(0, color="#777777", linewidth=0.7)
        axes.set_xticks(place, labels, rotation=30 if len(cases) > 3 else 0)
        axes.set_xlabel("prompt tokens × batch", fontsize=9)
        axes.set_ylabel("% of the dense model's", fontsize=9)
        axes.set_ylim(min(0, *saved), 1.35 * max(*saved, *removed, 1))
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for axes in (*above, *below):
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
