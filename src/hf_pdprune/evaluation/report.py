"""Report: report.md, a plot and a terminal table, from the artefacts of a run alone."""

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artefact_file import read_json, write_artefact
from ..plan import PruningPlan
from .link_report import HANDOVER_FILE_NAME, link_lines, read_handover
from .plan_plot import plot_plan
from .result_table import ResultTable, megabytes, numbers
from .results import kl_closed, read_results
from .row_file import RowFile
from .speed_plot import plot_speed
from .task_plot import plot_tasks
from .token_choice_report import TOKEN_CHOICE_FILE_NAME, token_choice_lines


logger = logging.getLogger(__name__)

REPORT_FILE_NAME = "report.md"
PLOT_FILE_NAME = "pruning_plan.png"
TASK_PLOT_FILE_NAME = "tasks.png"
SPEED_PLOT_FILE_NAME = "speed.png"
BENCHMARK_FILE_NAME = "benchmark.json"
_STATISTICS_FILE_NAME = "block_statistics.json"


def write_report(folder: str | os.PathLike) -> str:
    """
    Writes `report.md` and its pictures from `pruning_plan.json`, `results.json` and, where they are there,
    `block_statistics.json`, `benchmark.json`, `handover.json` and `token_choice.jsonl`. No model runs.

    Args:
        folder (`str`): Where the artefacts are.

    Returns:
        `str`: The tables, for a terminal.

    Raises:
        `FileNotFoundError`: If there is no plan or no results.
        `ValueError`: If an artefact is not valid.
    """
    folder = Path(folder)
    plan, results = PruningPlan.from_pretrained(folder), read_results(folder)
    statistics, benchmark = folder / _STATISTICS_FILE_NAME, folder / BENCHMARK_FILE_NAME
    cases = read_json(benchmark)["cases"] if benchmark.is_file() else []
    handover, token_choice = read_handover(folder / HANDOVER_FILE_NAME), list(RowFile(folder / TOKEN_CHOICE_FILE_NAME))
    plots = set()
    try:
        redundancy = read_redundancy(statistics) if statistics.is_file() else None
        plots.add(plot_plan(plan, redundancy, folder / PLOT_FILE_NAME).name)
        if results.get("tasks") and plot_tasks(results["tasks"], folder / TASK_PLOT_FILE_NAME):
            plots.add(TASK_PLOT_FILE_NAME)
        if cases:
            plots.add(plot_speed(cases, folder / SPEED_PLOT_FILE_NAME).name)
    except ImportError as error:
        logger.warning("%s", error)
    write_artefact(folder / REPORT_FILE_NAME, report_text(plan, results, plots, cases, handover, token_choice))
    return terminal_text(plan, results)


def read_redundancy(path: str | os.PathLike) -> list[float]:
    """
    Redundancy per block from `block_statistics.json`.

    Raises:
        `ValueError`: If the file has no such list.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return [float(value) for value in data["redundancy"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no list of numbers under the key redundancy") from error


def terminal_text(plan: PruningPlan, results: Mapping[str, Any]) -> str:
    """The tables and a line on healing, as plain text."""
    parts = []
    if not {"quality", "speed", "kv"}.isdisjoint(results):
        parts.append(ResultTable.of_quality_speed_and_bytes(results).to_text())
    if results.get("tasks"):
        parts.append(ResultTable.of_tasks(results["tasks"], results.get("tasks_mean")).to_text())
    if "quality_of_stages" in results:
        parts.append(ResultTable.of_stage_quality(results).to_text())
    if "speed" in results:
        parts.append(ResultTable.of_speed_and_shares(results["speed"]).to_text())
    parts.append("\n".join(_remarks(results)))
    projected = plan.prefill.projected_blocks
    parts.append(
        f"prefill does without blocks {numbers(plan.prefill.missing_blocks)}"
        + (f", and but for keys and values without {numbers(projected)}" if projected else "")
        + f"; decode without {numbers(plan.decode.missing_blocks)}"
    )
    return "\n\n".join(part for part in parts if part)


def report_text(
    plan: PruningPlan,
    results: Mapping[str, Any],
    plots: Collection[str] = (PLOT_FILE_NAME,),
    cases: Sequence[Mapping[str, Any]] = (),
    handover: Mapping[str, Any] | None = None,
    token_choice: Sequence[Mapping[str, Any]] = (),
) -> str:
    """
    The report in Markdown.

    Args:
        plan ([`PruningPlan`]): The plan.
        results (`Mapping`): What `results.json` holds; parts that are missing are left out.
        plots (`Collection[str]`): Names of the pictures that there are.
        cases (`Sequence[Mapping]`): `cases` of `benchmark.json`.
        handover (`Mapping`, *optional*): What `handover.json` holds.
        token_choice (`Sequence[Mapping]`): Rows of `token_choice.jsonl`.
    """
    lines = [f"# {Path(plan.base_model).name}, pruned per stage", ""]
    if not {"quality", "speed", "kv"}.isdisjoint(results):
        lines += [ResultTable.of_quality_speed_and_bytes(results).to_markdown(), ""]
    if "quality" in results:
        tokens = next(iter(results["quality"].values())).get("tokens")
        lines += [
            f"Perplexity and KL (nats) are per completion token{f', over {tokens:,} tokens' if tokens else ''} of "
            "held-out text, through the hand-over as it is deployed. With the token-aware cache, token-aware blocks "
            "hand over only some of the prompt's tokens; where all tokens are handed over, the cost is that "
            "of the missing blocks alone.",
            "",
        ]
    lines += [line + "  " for line in _remarks(results)] + [""]
    lines += _task_section(results, TASK_PLOT_FILE_NAME in plots)
    if "speed" in results:
        speed = results["speed"]
        size = ""
        if "batch_size" in speed:
            size = f" for {speed['prompt_tokens']:,} prompt tokens, batch {speed['batch_size']}"
        lines += ["## Speed", "", ResultTable.of_speed_and_shares(speed).to_markdown(), ""]
        lines += [
            f"Medians over turns of the dense model and the pair{size}. TTFT: from the prompt to the first token, "
            "payload included; TPOT: one greedy decode step on the prompt's cache.",
            "",
        ]
    if cases:
        lines += [ResultTable.of_speed_cases(cases).to_markdown(), ""]
        lines += [
            f"Latency and throughput of an answer of {cases[0]['latency']['answer_tokens']} tokens: TTFT and the TPOT "
            "that follow, without the time on a link. A search for a `target_latency_speedup` wants to know prefill's "
            "share of the dense model's.",
            "",
            ResultTable.of_roofline(cases).to_markdown(),
            "",
            "Prefill is bound by FLOPs, a decode step by the bytes that it reads (weights of blocks and LM head, KV "
            "entries): 100 % means that all of the share removed was saved in time. More is possible where something "
            "else is the limit.",
            "",
        ]
        if SPEED_PLOT_FILE_NAME in plots:
            lines += [f"![Times over the prompt length, and time saved]({SPEED_PLOT_FILE_NAME})", ""]
    commands = results.get("commands", {})
    if handover is not None:
        lines += ["## Links", "", *made_by(commands, "handover"), *link_lines(handover)]
    if token_choice:
        lines += ["## Which prompt tokens decode receives", "", *made_by(commands, "token_choice")]
        lines += token_choice_lines(token_choice)
    lines += ["## Plan", ""]
    if PLOT_FILE_NAME in plots:
        lines += [f"![Redundancy per block and what was removed]({PLOT_FILE_NAME})", ""]
    lines += [*_plan_table(plan), ""]
    if "sample" in results:
        sample = results["sample"]
        lines += ["## The same prompt, continued", ""]
        lines += [f"- **{name}**: {_one_line(str(text))}" for name, text in sample.items()] + [""]
    lines += _mapping_section("How the plan was found", plan.provenance)
    lines += _mapping_section("Distillation", results.get("distillation", {}))
    lines += _mapping_section("Measured on", results.get("environment", {}))
    return "\n".join(lines).rstrip() + "\n"


def made_by(commands: Mapping[str, str], recipe: str) -> list[str]:
    """Lines with the command by which a recipe made what follows, where it is known."""
    return ["```bash", commands[recipe], "```", ""] if recipe in commands else []


def _task_section(results: Mapping[str, Any], has_plot: bool) -> list[str]:
    """Tasks of lm-eval and quality on text, as recipes/evaluate.py measures them."""
    lines = []
    if results.get("tasks"):
        lines += [ResultTable.of_tasks(results["tasks"], results.get("tasks_mean")).to_markdown(), ""]
        lines += [
            "Contexts go through prefill, answers through decode. The difference is that of the pair to the dense "
            "model, ± its standard error over the rows of a task (both models answer the same ones).",
            "",
        ]
        if has_plot:
            lines += [f"![Right answers per task]({TASK_PLOT_FILE_NAME})", ""]
    for task, reason in results.get("tasks_skipped", {}).items():
        lines += [f"left out: {task} ({reason})  "]
    seen = [results.get(part, {}).get("seen_rows", {}) for part in ("overlap", "validation_overlap")]
    counts = [f"{name} {count}" for rows in seen for name, count in rows.items()]
    if counts:
        lines += [f"Rows that search or distillation had seen: {', '.join(counts)}  "]
    if "quality_of_stages" in results:
        tokens = results["quality_of_stages"]["dense"]["tokens"]
        lines += ["", ResultTable.of_stage_quality(results).to_markdown(), ""]
        lines += [f"On {tokens:,} completion tokens of held-out text, per token.", ""]
    return ["## Tasks and text", "", *lines] if lines else []


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """What the tables do not say at a glance."""
    remarks = []
    closed = {
        what: kl_closed(results[part])
        for part, what in (("quality", "token-aware cache"), ("quality_all_tokens", "all tokens handed over"))
        if part in results
    }
    closed = {what: share for what, share in closed.items() if share is not None}
    if closed:
        shares = ", ".join(f"{share:.0%} ({what})" for what, share in closed.items())
        remarks.append(f"Distillation closed of the KL that pruning opened: {shares}.")
    if "kv" in results:
        kv = results["kv"]
        by = ""
        if "ratio_by_blocks" in kv:
            by = f" ({kv['ratio_by_blocks']:.2f}x by blocks, {kv['ratio_by_tokens']:.2f}x by tokens)"
        remarks.append(
            f"KV bytes handed over: {megabytes(kv['bytes_sent'])} instead of {megabytes(kv['bytes_dense'])}, "
            f"{kv['ratio']:.2f}x fewer{by}."
        )
    return remarks


def _plan_table(plan: PruningPlan) -> list[str]:
    kv = plan.kv
    token_aware = kv.blocks_to_text(plan.decode.missing_blocks)
    lines = ["| | prefill | decode |", "|---|---|---|"]
    for title, key in (("blocks removed", "removed_blocks"), ("merged [kept, absorbed]", "merged_blocks")):
        cells = [numbers(getattr(plan.stage(stage), key)) for stage in ("prefill", "decode")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if plan.prefill.projected_blocks:
        lines.append(f"| only keys and values computed | {numbers(plan.prefill.projected_blocks)} | none |")
    kept = [f"{len(plan.kept_blocks(stage))} of {plan.num_hidden_layers}" for stage in ("prefill", "decode")]
    lines.append(f"| blocks left | {' | '.join(kept)} |")
    return [*lines, "", f"Token-aware blocks ({kv.to_text()}): {numbers(token_aware)}"]


def _mapping_section(title: str, mapping: Mapping[str, Any]) -> list[str]:
    """A list of what is simple enough to read; the rest is in the artefacts."""
    simple = (bool, int, float, str)
    lines = []
    for key, value in mapping.items():
        if isinstance(value, simple):
            lines.append(f"- {key}: {_text(value)}")
        elif isinstance(value, Mapping) and value and all(isinstance(part, simple) for part in value.values()):
            lines.append(f"- {key}: {', '.join(f'{name} {_text(part)}' for name, part in value.items())}")
    return [f"## {title}", "", *lines, ""] if lines else []


def _text(value: bool | int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _one_line(str(value))


def _one_line(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."
