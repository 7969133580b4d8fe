"""ResultTable: what results.json says, as a table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .task_comparison import is_accuracy


_COLUMNS = {"dense": "dense", "unhealed": "pruned, unhealed", "healed": "pruned, healed"}


@dataclass
class ResultTable:
    """
    A table of texts, first row and first column being titles.

    Args:
        rows (`list[list[str]]`): Rows of equally many cells.
    """

    rows: list[list[str]] = field(default_factory=list)

    @classmethod
    def of_quality_speed_and_bytes(cls, results: Mapping[str, Any]) -> "ResultTable":
        """The main table: the dense model and the pair before and after distillation."""
        measured = results.get("quality", {})
        names = [name for name in _COLUMNS if name in measured] or ["dense", "healed"]
        names += [name for name in measured if name not in names]
        table = cls([["", *(_COLUMNS.get(name, name) for name in names)]])
        for part, what in (("quality", "token-aware cache"), ("quality_all_tokens", "all tokens handed over")):
            for key, title in (("perplexity", "perplexity"), ("kl", "KL to dense")):
                if part in results:
                    values = [results[part].get(name, {}).get(key) for name in names]
                    table.rows.append([f"{title}, {what}", *map(_number, values)])
        if "speed" in results:
            speed = results["speed"]
            for key, title in (("ttft_ratio", "TTFT, pruned / dense"), ("tpot_ratio", "TPOT, pruned / dense")):
                table.rows.append([title, *("1" if name == "dense" else f"{speed[key]:.3f}" for name in names)])
        if "kv" in results:
            kv = results["kv"]
            sent = {name: kv["bytes_dense"] if name == "dense" else kv["bytes_sent"] for name in names}
            title = f"KV bytes, {kv['prompt_tokens']:,} prompt tokens"
            table.rows.append([title, *(megabytes(sent[name]) for name in names)])
            ratios = ("1" if name == "dense" else f"{kv['ratio']:.2f}x" for name in names)
            table.rows.append(["KV bytes, times fewer", *ratios])
        return table

    @classmethod
    def of_speed_and_shares(cls, speed: Mapping[str, Any]) -> "ResultTable":
        """Time saved beside the share of parameters removed."""
        table = cls([["", "ratio", "time saved", "parameters removed", "saved / removed"]])
        for time, stage, of in (("ttft", "prefill", "blocks"), ("tpot", "decode", "blocks and LM head")):
            ratio, share = speed[f"{time}_ratio"], speed[f"{stage}_share_removed"]
            relation = f"{(1 - ratio) / share:.0%}" if share > 0 else ""
            cells = [f"{ratio:.3f}", f"{1 - ratio:.1%}", f"{share:.1%} of {of}", relation]
            table.rows.append([f"{time.upper()} ({stage})", *cells])
        return table

    @classmethod
    def of_speed_cases(cls, cases: Sequence[Mapping[str, Any]]) -> "ResultTable":
        """A row per prompt length and batch size of a benchmark."""
        title = ["prompt", "batch"]
        for what in ("TTFT", "TPOT"):
            title += [f"{what} dense", "pruned", "ratio"]
        table = cls([[*title, "dense: prefill's share", "latency", "tokens/s", "KV held", "KV sent", "peak memory"]])
        for case in cases:
            row = [f"{case['prompt_tokens']:,}", str(case["batch_size"])]
            for what in ("ttft", "tpot"):
                row += [f"{1000 * case[what][name]['median']:.1f} ms" for name in ("dense", "pruned")]
                low, high = case[what]["ratio_quartiles"]
                row.append(f"{case[what]['ratio']:.3f} ({low:.2f}-{high:.2f})")
            row.append(f"{case['ttft']['dense']['median'] / case['latency']['dense']:.0%}")
            row += [f"x {case['latency']['ratio']:.3f}", f"x {case['throughput']['ratio']:.3f}"]
            held, sent = case["kv"]["bytes_held"], case["kv"]
            row.append(f"{megabytes(held['pruned'])} ({held['dense'] / held['pruned']:.2f}x fewer)")
            row.append(f"{megabytes(sent['bytes_sent'])} ({sent['ratio']:.2f}x fewer)")
            peaks = [case["memory"][stage] for stage in ("prefill", "decode")]
            row.append(
                "not measured"
                if any(value is None for peak in peaks for value in peak.values())
                else ", ".join(f"{megabytes(peak['pruned'])} of {megabytes(peak['dense'])}" for peak in peaks)
            )
            table.rows.append(row)
        return table.without_empty_columns()

    @classmethod
    def of_roofline(cls, cases: Sequence[Mapping[str, Any]]) -> "ResultTable":
        """Time saved beside the share of what limits each stage."""
        title = ["prompt", "batch", "prefill FLOPs removed", "time saved", "of the share"]
        table = cls([[*title, "decode bytes removed", "time saved", "of the share"]])
        for case in cases:
            row = [f"{case['prompt_tokens']:,}", str(case["batch_size"])]
            for what, limit in (("ttft", "prefill_flops"), ("tpot", "decode_bytes")):
                removed, saved = case["roofline"][f"{limit}_removed"], 1 - case[what]["ratio"]
                row += [f"{removed:.1%}", f"{saved:.1%}", f"{saved / removed:.0%}" if removed > 0 else ""]
            table.rows.append(row)
        return table

    @classmethod
    def of_links(
        cls, cases: Sequence[Mapping[str, Any]], gigabits: Sequence[float] = (1, 10, 100, 400)
    ) -> "ResultTable":
        """Time to send the prompts' KV entries, dense and pruned, over links of some speeds (bytes over bandwidth)."""
        table = cls([["prompt", "batch", *(f"{speed:g} Gbit/s" for speed in gigabits)]])
        for case in cases:
            row = [f"{case['prompt_tokens']:,}", str(case["batch_size"])]
            for speed in gigabits:
                dense, sent = (1000 * 8 * case["kv"][key] / (speed * 1e9) for key in ("bytes_dense", "bytes_sent"))
                row.append(f"{dense:.3g} -> {sent:.3g} ms")
            table.rows.append(row)
        return table

    @classmethod
    def of_tasks(cls, tasks: Mapping[str, Any], mean: Mapping[str, Any] | None = None) -> "ResultTable":
        """Tasks of lm-eval: the dense model beside the pair, and the difference with its standard error over rows."""
        table = cls([["task", "metric", "rows", "dense", "pruned", "difference"]])
        for name, part in tasks.items():
            cells = [_metric(part["metric"], part[key]) for key in ("dense", "pruned")]
            table.rows.append([name, part["metric"], str(part["rows"]), *cells, difference(part)])
        if mean is not None:
            cells = [_metric("acc", mean[key]) for key in ("dense", "pruned")]
            table.rows.append(["mean", "accuracy", "", *cells, difference({"metric": "acc", **mean})])
        return table

    @classmethod
    def of_stage_quality(cls, results: Mapping[str, Any]) -> "ResultTable":
        """
        Perplexity, KL and top-1 agreement on held-out text, of all tokens and by stage, and KV bytes: a row for the
        dense model and for each way of handing over.
        """
        titles = {
            "perplexity": "perplexity",
            "kl": "KL to dense",
            "kl_prefill": "first token",
            "kl_decode": "others",
            "top1_agreement": "top-1 agreement",
        }
        sent = results.get("kv_of_stages", {})
        bytes_title = next((f"KV bytes, {part['prompt_tokens']:,} prompt tokens" for part in sent.values()), "")
        table = cls([["", *titles.values(), bytes_title]])
        for suffix, what in (("", ""), ("_all_tokens", ", all tokens handed over")):
            for name, part in results[f"quality_of_stages{suffix}"].items():
                if name == "dense" and suffix:
                    continue
                cells = [_number(part.get(key)) for key in titles]
                if part.get("kl_stderr") is not None and name != "dense":
                    cells[1] += f" ± {_number(part['kl_stderr'])}"
                kv = results.get(f"kv_of_stages{suffix}", {}).get(name)
                if name == "dense" and sent:
                    fewer = megabytes(next(iter(sent.values()))["bytes_dense"])
                else:
                    fewer = f"{megabytes(kv['bytes_sent'])} ({kv['ratio']:.2f}x fewer)" if kv else ""
                table.rows.append([f"{name}{what}", *cells, fewer])
        return table.without_empty_columns()

    def without_empty_columns(self) -> "ResultTable":
        """The table without columns in which nothing was measured."""
        kept = [column for column in range(len(self.rows[0])) if any(row[column] for row in self.rows[1:])]
        return ResultTable([[row[column] for column in kept] for row in self.rows])

    def to_text(self) -> str:
        """For a terminal: columns of equal width, the first one left, the others right."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(len(self.rows[0]))]
        lines = []
        for row in self.rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join(lines)

    def to_markdown(self) -> str:
        lines = [f"| {' | '.join(row)} |" for row in self.rows]
        lines.insert(1, "|---" + "|---:" * (len(self.rows[0]) - 1) + "|")
        return "\n".join(lines)


def megabytes(nbytes: int) -> str:
    """Bytes in the unit that suits them (1 MB is 10^6 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def numbers(values: Sequence[Any]) -> str:
    """Block numbers or pairs as text."""
    return ", ".join(str(list(value)) if isinstance(value, tuple) else str(value) for value in values) or "none"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1e5 else f"{value:.2e}"


def _metric(name: str, value: float) -> str:
    """Accuracies in per cent, all else as a number."""
    return f"{100 * value:.1f} %" if is_accuracy(name) else _number(value)


def difference(part: Mapping[str, Any]) -> str:
    """A difference of two values of a metric, with its standard error where it has one; of accuracies in points."""
    factor, unit = (100, " points") if is_accuracy(part["metric"]) else (1, "")
    text = f"{factor * part['difference']:+.1f}"
    if part.get("difference_stderr") is not None:
        text += f" ± {factor * part['difference_stderr']:.1f}"
    return text + unit
