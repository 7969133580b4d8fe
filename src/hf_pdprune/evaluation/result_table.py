"""ResultTable: what results.json says, as a table for people."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1e5 else f"{value:.2e}"
