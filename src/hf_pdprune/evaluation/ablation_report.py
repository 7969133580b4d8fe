"""Ablation report: the tables of a study, from the rows that it has kept. No model runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .result_table import ResultTable, numbers


PLAN = "the plan"
SECTIONS = {
    "parts": (
        "Blocks, cache, both",
        "The same plan with parts of it left out. Nothing is healed. KL and perplexity per completion token of "
        "held-out text, through the hand-over.",
    ),
    "healing": (
        "With and without distillation",
        "The same plan before and after distillation; checkpoints as they are deployed.",
    ),
    "strategies": (
        "How the blocks are chosen",
        "Sets of equally many blocks, found on the same calibration text by the same objective code, none of them "
        "healed, each with as many token-aware blocks. `unified` removes the same blocks from both stages, as many in "
        "all as the stage-wise plan; `mirrored` takes from prefill as many as the plan takes from decode, and from "
        "decode as many as it takes from prefill (the relaxed subset rule: prefill still projects the keys and values "
        "that decode needs). Cost is the search's, in dense forwards over the calibration set.",
    ),
    "windows": ("Window of the token-aware blocks", "First and last prompt tokens that the same blocks hand over."),
    "caches": (
        "Which prompt tokens decode receives",
        "The plan's token-aware blocks and other choices, all but the first row at equal bytes. Nothing is healed. "
        "For H2O and SnapKV in all blocks see recipes/token_choice.py.",
    ),
    "quantization": ("Quantised payload", "The plan, and what it hands over in fewer bits. Nothing is healed."),
    "draft": (
        "Pruned decode stage as draft of the dense model",
        "Greedy assisted decoding as transformers has it. The text is the dense model's; what is saved are its "
        "forwards.",
    ),
}


def ablation_tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """
    Markdown of a study.

    Args:
        rows (`Iterable[Mapping]`): Rows of [`RowFile`]: `settings` with `section` and `variant`, and `result`.
    """
    by_section: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        if row["settings"].get("section") in SECTIONS:
            by_section.setdefault(row["settings"]["section"], []).append((row["settings"]["variant"], row["result"]))
    lines = []
    for section, (title, text) in SECTIONS.items():
        if section in by_section:
            table = _draft_table if section == "draft" else _quality_table
            lines += [f"### {title}", "", text, "", table(by_section[section]).to_markdown(), ""]
            if section == "strategies":
                lines += [verdict(by_section[section]), ""]
    return "\n".join(lines)


def verdict(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """
    Says of each other way to choose blocks whether the plan is better than it, in KL and in accuracy.

    Args:
        rows (`Sequence[tuple[str, Mapping]]`): Variant and result, `"the plan"` among them.
    """
    results = dict(rows)
    plan = results.pop(PLAN, None)
    if plan is None or not results:
        return ""
    better = {name: plan["quality"]["kl"] < result["quality"]["kl"] for name, result in results.items()}
    lines = []
    for is_better, word in ((True, "lower"), (False, "not lower")):
        names = [
            f"{name} ({result['quality']['kl'] - plan['quality']['kl']:+.3f})"
            for name, result in results.items()
            if better[name] == is_better
        ]
        if names:
            lines.append(f"The plan's KL is {word} than that of {', '.join(names)}.")
    compared = {name: result for name, result in results.items() if "accuracy" in result and "accuracy" in plan}
    for name, result in compared.items():
        difference = plan["accuracy"]["mean"] - result["accuracy"]["mean"]
        lines.append(f"Accuracy against {name}: {100 * difference:+.1f} points.")
    if "unified" in results:
        unified = len(results["unified"]["decode"])
        lines.append(
            f"As many blocks in all is not the same saving: the plan takes {len(plan['prefill'])} blocks from prefill "
            f"and {len(plan['decode'])} from decode, the unified one {unified} from both. Short answers favour what "
            "prefill loses, long ones what decode loses; KL per completion token counts what decode loses at every "
            "token."
        )
    if "mirrored" in results:
        mirrored = results["mirrored"]
        difference = mirrored["quality"]["kl"] - plan["quality"]["kl"]
        lines.append(
            f"{len(mirrored['prefill'])} blocks out of prefill and {len(mirrored['decode'])} out of decode instead: "
            f"{difference:+.3f}."
        )
    return "\n".join(lines)


def _quality_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> ResultTable:
    title = ["variant", "prefill removes", "decode removes too", "KV fewer", "perplexity", "KL", "KL first", "KL rest"]
    parts = [result.get("other_tasks", {}) for _, result in rows]
    others = {task: f"{task}, {part['metric']}" for by_task in parts for task, part in by_task.items()}
    table = ResultTable([[*title, "top-1", "accuracy", *others.values(), "search cost"]])
    for name, result in rows:
        quality = result["quality"]
        accuracy, by_task = result.get("accuracy"), result.get("other_tasks", {})
        table.rows.append(
            [
                name,
                numbers(result["prefill"]),
                _decode_blocks(result),
                f"{result['kv_reduction']:.2f}x",
                f"{quality['perplexity']:.1f}",
                f"{quality['kl']:.3f}" + (f" ± {quality['kl_stderr']:.3f}" if "kl_stderr" in quality else ""),
                f"{quality['kl_prefill']:.3f}",
                f"{quality['kl_decode']:.3f}" if "kl_decode" in quality else "",
                f"{quality['top1_agreement']:.1%}",
                "" if accuracy is None else f"{accuracy['mean']:.1%} ± {accuracy['stderr']:.1%}",
                *(f"{by_task[task]['value']:.2f}" if task in by_task else "" for task in others),
                "" if result.get("search_cost") is None else f"{result['search_cost']:.1f}",
            ]
        )
    return table.without_empty_columns()


def _decode_blocks(result: Mapping[str, Any]) -> str:
    """What decode removes beside prefill's blocks, and which of these it keeps (the relaxed subset rule)."""
    more = numbers([block for block in result["decode"] if block not in result["prefill"]])
    kept = [block for block in result["prefill"] if block not in result["decode"]]
    return f"{more} (keeps {numbers(kept)})" if kept else more


def _draft_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> ResultTable:
    table = ResultTable([["draft", "tokens per dense forward", "time, assisted / plain", "same text", "prompts"]])
    for name, result in rows:
        table.rows.append(
            [
                name,
                f"{result['tokens_per_forward']:.2f}",
                f"{result['time_ratio']:.2f}",
                f"{result['same_text']:.0%}",
                str(result["prompts"]),
            ]
        )
    return table
