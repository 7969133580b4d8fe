"""
The picture in README.md: what missing blocks cost, by strategy, from the output folders of the study.

    python dev/search_study/plot.py outputs/removal outputs/merges dev/search_pareto.png
"""

import json
import sys
from pathlib import Path

from hf_pdprune.evaluation.figures import new_figure, save_figure


LABELS = {
    "one_shot": "one-shot (ShortGPT)",
    "contiguous": "contiguous group",
    "greedy": "greedy (SLEB)",
    "annealing": "annealing",
    "annealing+merges": "annealing, pairs merged",
}


def searched(folders):
    """KL on the text that was searched on, by strategy and number of blocks; of seed 0, all that its front holds."""
    points = {name: {0: 0.0} for name in LABELS}
    for folder in folders:
        for row in json.loads((folder / "search_study.json").read_text()):
            if row["strategy"] in points and not row["seed"]:
                points[row["strategy"]][row["num_blocks"]] = row["kl_calibration"]
        for name in LABELS:
            for path in (*folder.glob(f"fronts/*-{name}/*.json"), *folder.glob(f"fronts/*-{name}-0/*.json")):
                for point in json.loads(path.read_text())["points"]:
                    points[name][point["num_decode_blocks"]] = point["kl"]
    return points


def held_out(folders, text):
    """The same on another text, mean of the seeds."""
    points = {name: {0: [0.0]} for name in LABELS}
    for folder in folders:
        for row in json.loads((folder / "search_study.json").read_text()):
            if row["strategy"] in points and row["validation"] == text:
                points[row["strategy"]].setdefault(row["num_blocks"], []).append(row["kl"])
    return {name: {count: sum(kl) / len(kl) for count, kl in line.items()} for name, line in points.items()}


def main(*arguments):
    *folders, path = map(Path, arguments)
    figure = new_figure(9, 3.8)
    panels = {
        "PIQA + MMLU, searched on": searched(folders),
        "PIQA + MMLU, others": held_out(folders, "piqa+mmlu"),
        "WikiText-2": held_out(folders, "wikitext2"),
    }
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, line in lines.items():
            axes.plot(*zip(*sorted(line.items()), strict=True), "o-", markersize=3, label=LABELS[name])
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylim(bottom=0)
    all_axes[1].set_xlabel("blocks missing in both stages")
    all_axes[0].set_ylabel("KL to the dense model\nper completion token (nats)")
    all_axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
