"""RunComparison: several runs side by side, from their artefacts alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artefact_file import read_json, write_artefact
from ..plan import PLAN_FILE_NAME, PruningPlan
from .ablation_report import ablation_tables
from .figures import new_figure, save_figure
from .link_report import HANDOVER_FILE_NAME, link_lines, read_handover
from .report import BENCHMARK_FILE_NAME, made_by
from .result_table import ResultTable, difference, numbers
from .results import RESULTS_FILE_NAME, read_results
from .row_file import RowFile
from .search_study_report import SEARCH_STUDY_FILE_NAME, search_study_table
from .token_choice_report import TOKEN_CHOICE_FILE_NAME, token_choice_lines


ABLATION_FILE_NAME = "ablation.jsonl"
_RUNS = (
    "Ratios are pruned / dense, of each run's first benchmark; KV bytes are of a prompt of so many tokens. KL in nats "
    "per completion token of held-out text: before healing on that of the main job, else on what the run was "
    "evaluated on."
)
_SPEEDS = {
    "ttft_ratio": "time to first token, pruned / dense",
    "tpot_ratio": "time per output token, pruned / dense",
}
_MARKERS = "osD^vP"
_SEARCHES = (
    "The same blocks are missing in both stages, and nothing is healed. KL in nats per completion token, means over "
    "seeds; spread: largest less smallest, of the mean, on the first held-out text; overlap: share of missing blocks "
    "that two seeds have in common."
)


@dataclass
class Run:
    """
    What one folder holds.

    Args:
        name (`str`): Its name in tables.
        plan ([`PruningPlan`], *optional*): Its plan.
        results (`dict`): Its results; empty where there are none.
        cases (`list`): `cases` of its benchmark.
        ablation (`list`): Rows of its study.
        handover (`dict`, *optional*): What was measured of its hand-overs over links.
        token_choice (`list`): Rows of what was measured of the prompt tokens that decode receives.
        search_study (`list`): Rows of its study of searches.
    """

    name: str
    plan: PruningPlan | None
    results: dict[str, Any]
    cases: list[dict[str, Any]]
    ablation: list[dict[str, Any]]
    handover: dict[str, Any] | None = None
    token_choice: list[dict[str, Any]] = field(default_factory=list)
    search_study: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, name: str | None = None) -> "Run":
        """
        Reads a folder.

        Raises:
            `FileNotFoundError`: If it holds no results of any kind.
            `ValueError`: If an artefact is not valid.
        """
        folder = Path(folder)
        has = {file: (folder / file).is_file() for file in (PLAN_FILE_NAME, RESULTS_FILE_NAME, BENCHMARK_FILE_NAME)}
        names = (RESULTS_FILE_NAME, ABLATION_FILE_NAME, TOKEN_CHOICE_FILE_NAME, SEARCH_STUDY_FILE_NAME)
        if not any((folder / file).is_file() for file in names):
            raise FileNotFoundError(f"{folder}: none of {', '.join(names)}")
        results = read_results(folder) if has[RESULTS_FILE_NAME] else {}
        if not results and not any((folder / file).is_file() for file in names[1:]):
            raise ValueError(f"{folder / RESULTS_FILE_NAME} holds no results")
        if "prune" in results.get("commands", {}) and not has[PLAN_FILE_NAME]:
            raise FileNotFoundError(f"{folder}: no {PLAN_FILE_NAME} beside the results of its run")
        searches = folder / SEARCH_STUDY_FILE_NAME
        return cls(
            name or folder.name,
            PruningPlan.from_pretrained(folder) if has[PLAN_FILE_NAME] else None,
            results,
            read_json(folder / BENCHMARK_FILE_NAME)["cases"] if has[BENCHMARK_FILE_NAME] else [],
            list(RowFile(folder / ABLATION_FILE_NAME)),
            read_handover(folder / HANDOVER_FILE_NAME),
            list(RowFile(folder / TOKEN_CHOICE_FILE_NAME)),
            read_json(searches) if searches.is_file() else [],
        )

    @property
    def kl(self) -> float | None:
        """KL of the finished pair: of the stages that were evaluated, else of the healed ones of the main job."""
        for part, name in (("quality_of_stages", "pruned"), ("quality", "healed"), ("quality", "unhealed")):
            if name in self.results.get(part, {}):
                return self.results[part][name]["kl"]
        return None

    @property
    def kl_unhealed(self) -> float | None:
        """KL before distillation, on the main job's held-out text."""
        return self.results.get("quality", {}).get("unhealed", {}).get("kl")

    def summary(self) -> list[str]:
        """Its row in the table of runs."""
        plan, speed, kv = self.plan, self.results.get("speed", {}), self.results.get("kv", {})
        mean = self.results.get("tasks_mean")
        window = ""
        if plan is not None and plan.kv.token_aware_blocks:
            windows = [own for block, own in plan.kv.windows.items() if block not in plan.decode.missing_blocks]
            sizes = [f"{first} + {last}" for first, last in sorted(set(windows), key=sum)]
            window = f"{len(windows)} blocks, {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))}" if sizes else ""
            window += " by attention" if plan.kv.token_choice == "attention" else ""
        return [
            self.name,
            "" if plan is None else numbers(plan.prefill.skipped_blocks),
            "" if plan is None else numbers(plan.decode.missing_blocks),
            window,
            *("" if kl is None else f"{kl:.3f}" for kl in (self.kl_unhealed, self.kl)),
            *("" if mean is None else f"{mean[name]:.1%}" for name in ("dense", "pruned")),
            "" if mean is None else difference({"metric": "acc", **mean}),
            f"{speed['ttft_ratio']:.3f}" if speed else "",
            f"{speed['tpot_ratio']:.3f}" if speed else "",
            f"{kv['ratio']:.2f}x of {kv['prompt_tokens']:,}" if kv else "",
        ]


def compare_runs(
    folders: Mapping[str, str | os.PathLike], output: str | os.PathLike, title: str = "Results", notes: str = ""
) -> str:
    """
    Writes a comparison of runs as Markdown, and a picture beside it where two or more have KL and TPOT.

    Args:
        folders (`Mapping[str, str]`): Folder of each run, by the name that it has in the tables.
        output (`str`): The Markdown file.
        title (`str`): Its heading.
        notes (`str`, *optional*): Markdown that stands below the comparison, before the runs by themselves.

    Returns:
        `str`: The table of runs, for a terminal.

    Raises:
        `FileNotFoundError`: If a folder holds no results.
    """
    output = Path(output)
    runs = [Run.from_folder(folder, name) for name, folder in folders.items()]
    header = ["run", "prefill removes", "decode removes", "token-aware", "KL, unhealed", "KL"]
    header += ["accuracy dense", "pruned", "difference"]
    pairs = [run for run in runs if run.plan is not None and run.results]
    table = ResultTable([[*header, "TTFT ratio", "TPOT ratio", "KV fewer"], *(run.summary() for run in pairs)])
    made = "Made by `recipes/compare.py` from the artefacts of runs; no number is typed in"
    lines = [f"# {title}", "", made + (", but for the notes." if notes else "."), ""]
    if pairs:
        table = table.without_empty_columns()
        lines += [table.to_markdown(), ""]
        lines += [_RUNS, ""]
    by_task = accuracies_by_task(pairs)
    if by_task is not None:
        lines += ["Difference to the dense model by task, on the rows that each run was evaluated on:", ""]
        lines += [by_task.to_markdown(), ""]
    picture = output.with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    if plot_runs(runs, picture) is not None:
        lines += [f"![KL over TTFT and TPOT]({picture.name})", ""]
    if notes:
        lines += [notes.strip(), ""]
    for run in runs:
        lines += [f"## {run.name}", "", *_details(run)]
    write_artefact(output, "\n".join(lines).rstrip() + "\n")
    if pairs:
        return table.to_text()
    studies = [ablation_tables([row for run in runs for row in run.ablation])]
    studies += [search_study_table(run.search_study).to_text() for run in runs if run.search_study]
    studies += ["\n".join(token_choice_lines(run.token_choice)) for run in runs]
    return "\n".join(study for study in studies if study)


def accuracies_by_task(runs: Sequence[Run]) -> ResultTable | None:
    """
    A row per task and a column per run: differences to the dense model, with their standard errors. `None` where fewer
    than two runs have tasks.
    """
    runs = [run for run in runs if run.results.get("tasks")]
    if len(runs) < 2:
        return None
    table = ResultTable([["", *(run.name for run in runs)]])
    for task in dict.fromkeys(task for run in runs for task in run.results["tasks"]):
        parts = [run.results["tasks"].get(task) for run in runs]
        table.rows.append([task, *("" if part is None else difference(part) for part in parts)])
    means = [run.results.get("tasks_mean") for run in runs]
    table.rows.append(["mean", *("" if mean is None else difference({"metric": "acc", **mean}) for mean in means)])
    return table


def _details(run: Run) -> list[str]:
    results, lines = run.results, []
    commands = results.get("commands", {})
    if results.get("tasks"):
        lines += made_by(commands, "evaluate")
        lines += [ResultTable.of_tasks(results["tasks"], results.get("tasks_mean")).to_markdown(), ""]
        lines += ["± is the standard error of the difference over the rows, which both models answer.", ""]
    lines += [f"Left out: {task}, {reason}  " for task, reason in results.get("tasks_skipped", {}).items()]
    if "quality_of_stages" in results:
        tokens = results["quality_of_stages"]["dense"]["tokens"]
        lines += [ResultTable.of_stage_quality(results).to_markdown(), "", f"{tokens:,} completion tokens.", ""]
    if not {"quality", "quality_all_tokens"}.isdisjoint(results):
        lines += made_by(commands, "prune")
        lines += [ResultTable.of_quality_speed_and_bytes(results).to_markdown(), ""]
    if run.cases:
        lines += made_by(commands, "benchmark")
        lines += [ResultTable.of_speed_cases(run.cases).to_markdown(), ""]
        lines += ["Medians over interleaved turns; in brackets the quartiles of the ratio.", ""]
        lines += [ResultTable.of_roofline(run.cases).to_markdown(), ""]
        lines += [ResultTable.of_links(run.cases).to_markdown(), ""]
        lines += ["Time to send the KV entries of the prompts over a link of so many Gbit/s, headers aside.", ""]
    if run.handover is not None:
        lines += ["### Links", "", *made_by(commands, "handover"), *link_lines(run.handover)]
    if run.ablation:
        lines += made_by(commands, "ablation")
        lines += [ablation_tables(run.ablation), ""]
    if run.search_study:
        lines += made_by(commands, "search_study")
        lines += [search_study_table(run.search_study).without_empty_columns().to_markdown(), "", _SEARCHES, ""]
    if run.token_choice:
        lines += ["### Which prompt tokens decode receives", "", *made_by(commands, "token_choice")]
        lines += token_choice_lines(run.token_choice)
    environment = results.get("environment") or results.get("evaluation_environment")
    if environment:
        lines += [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    return lines


def plot_runs(runs: Sequence[Run], path: str | os.PathLike) -> Path | None:
    """
    Draws KL over TTFT and over TPOT, a point per run; `None` where fewer than two runs have all three.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    runs = [run for run in runs if "speed" in run.results and run.kl is not None]
    if len(runs) < 2:
        return None
    figure = new_figure(10.8, 4.2)
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), _SPEEDS.items(), strict=True):
        for number, run in enumerate(runs):
            look = {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}
            axes.scatter(run.results["speed"][key], run.kl, label=run.name, s=44, zorder=2, **look)
        axes.scatter([1], [0], color="#33475b", s=44, zorder=2, clip_on=False, label="dense")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.axes[0].set_ylabel("KL to dense (nats per token)", fontsize=9)
    return save_figure(figure, path)
