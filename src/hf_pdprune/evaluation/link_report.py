"""Link report: what a hand-over costs over links, and where fewer bytes pay, from handover.json alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artefact_file import read_json
from .result_table import ResultTable, megabytes


HANDOVER_FILE_NAME = "handover.json"
_PARTS = ("settings", "environment", "measured", "modelled")
# Of TTFT: what changes it by less is not told from chance.
_LEAST_SHARE = 0.01


def read_handover(path: str | os.PathLike) -> dict[str, Any] | None:
    """
    What `handover.json` holds; `None` where there is no such file.

    Raises:
        `ValueError`: If it is not valid.
    """
    if not Path(path).is_file():
        return None
    handover = read_json(path)
    missing = [part for part in _PARTS if part not in handover]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; run recipes/handover.py again")
    return handover


def link_lines(handover: Mapping[str, Any]) -> list[str]:
    """
    Lines of Markdown.

    Args:
        handover (`Mapping`): What `handover.json` holds: `settings`, `environment`, and rows `measured` and `modelled`
            (see [`measured_and_modelled`]).
    """
    settings, environment = handover["settings"], handover["environment"]
    lines = [
        f"One prompt of {settings['prompt_tokens']:,} tokens, {environment['device']}, {environment['dtype']}. "
        "Where prefill gives the first token, TTFT has no transfer in it, and the second token waits for it; where "
        "decode gives it, TTFT has. Hand-over time: from the end of prefill until decode has the payload (what is "
        "left to pack and to send, and unpacking), and its share of that TTFT. TPOT: a decode step.",
        "",
        f"Measured over a loopback socket that keeps to each link's pace, medians of {settings['repeats']} in turns:",
        "",
        link_table(handover["measured"]).to_markdown(),
        "",
        "The same hand-overs over other links, by a model of the link:",
        "",
        link_table(handover["modelled"]).to_markdown(),
        "",
        "Where fewer bytes pay, and where it is fewer blocks that do:",
        "",
        gain_table(handover["modelled"]).to_markdown(),
        "",
    ]
    return lines + [line + "  " for line in verdicts(handover["modelled"])] + [""]


def link_table(rows: Sequence[Mapping[str, Any]]) -> ResultTable:
    """A row per link, kind of hand-over and way to send it."""
    title = ["link", "hand-over", "sent", "bytes", "TTFT, from prefill", "second token", "TTFT, from decode"]
    table = ResultTable([[*title, "hand-over time", "share", "TPOT"]])
    for row in rows:
        cells = [row["link"], row["kind"], row["sent"], megabytes(row["bytes_sent"])]
        cells += [milliseconds(row[key]) for key in ("ttft", "second_token", "ttft_decode", "hand_over")]
        table.rows.append([*cells, f"{row['hand_over_share']:.1%}", milliseconds(row["tpot"])])
    return table


def gain_table(rows: Sequence[Mapping[str, Any]]) -> ResultTable:
    """
    A row per link and way to send: TTFT where decode gives the first token, beside the first kind's, and what of the
    difference lies in the hand-over (fewer bytes) and what in computing (fewer blocks).
    """
    first, *others = dict.fromkeys(row["kind"] for row in rows)
    table = ResultTable([["link", "sent", f"{first}, TTFT", "of it hand-over"]])
    for kind in others:
        table.rows[0] += [f"{kind}, TTFT", "saved in the hand-over", "saved in computing"]
    for (link, sent), by_kind in _side_by_side(rows).items():
        base = by_kind[first]
        cells = [link, sent, milliseconds(base["ttft_decode"]), milliseconds(base["hand_over"])]
        for kind in others:
            saved = base["ttft_decode"] - by_kind[kind]["ttft_decode"]
            by_bytes = base["hand_over"] - by_kind[kind]["hand_over"]
            cells.append(f"x {by_kind[kind]['ttft_decode'] / base['ttft_decode']:.3f}")
            cells += [milliseconds(by_bytes), milliseconds(saved - by_bytes)]
        table.rows.append(cells)
    return table


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each kind after the first and each way to send, over which links it pays beside the kind before it."""
    cases = _side_by_side(rows)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    sentences = []
    for before, kind in zip(kinds, kinds[1:], strict=False):
        for sent in dict.fromkeys(sent for _, sent in cases):
            shares = {
                link: (by_kind[before]["hand_over"] - by_kind[kind]["hand_over"]) / by_kind[before]["ttft_decode"]
                for (link, way), by_kind in cases.items()
                if way == sent
            }
            sentences.append(f"{kind} instead of {before}, {sent}: the hand-over {_effect(shares)}.")
    return sentences


def _effect(shares: Mapping[str, float]) -> str:
    """What shares of TTFT, by link, are saved."""
    parts = []
    for what, links in (
        ("takes from TTFT", [link for link, share in shares.items() if share >= _LEAST_SHARE]),
        ("adds to TTFT", [link for link, share in shares.items() if share <= -_LEAST_SHARE]),
    ):
        if links:
            parts.append(f"{what} " + ", ".join(f"{abs(shares[link]):.1%} ({link})" for link in links))
    rest = [link for link, share in shares.items() if abs(share) < _LEAST_SHARE]
    if rest:
        parts.append(f"changes TTFT by less than {_LEAST_SHARE:.0%} ({', '.join(rest)})")
    return "; ".join(parts)


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Rows by kind, for each link and way to send."""
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["link"], row["sent"]), {})[row["kind"]] = row
    return cases


def milliseconds(seconds: float) -> str:
    """Seconds in milliseconds, with as many digits as matter."""
    value = 1000 * seconds
    return f"{value:,.0f} ms" if abs(value) >= 100 else f"{value:.3g} ms"
