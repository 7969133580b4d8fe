"""Search study report: strategies, seeds and calibration texts against each other, from search_study.json alone."""

import json
import statistics as stats
from collections.abc import Iterable, Mapping, Sequence
from operator import truediv
from typing import Any

from .result_table import ResultTable


SEARCH_STUDY_FILE_NAME = "search_study.json"
# What tells searches apart, but for their seeds.
SEARCH_KEYS = (
    "strategy", "num_blocks", "calibration", "calibration_digest", "removable_blocks", "annealing_share",
    "merge_source",
)  # fmt: skip
# On what a row measures what was found.
PLACE_KEYS = ("validation", "validation_source", "validation_examples")
# Options that the table shows where they differ.
_SHOWN = (
    "calibration_examples", "prompt_tokens", "completion_tokens", "batch_size", "annealing_share", "merge_tokens",
    "merge_rank",
)  # fmt: skip


def search_study_table(rows: Iterable[Mapping[str, Any]]) -> ResultTable:
    """
    A row for each calibration text, number of blocks and strategy: means over seeds, and their spread. Those that were
    made with other options have columns that say which.

    Args:
        rows (`Iterable[Mapping]`): Rows of `recipes/search_study.py`. Those that do not say what they were made with
            are left out.
    """
    rows = [row for row in rows if all(key in row for key in (*SEARCH_KEYS, *PLACE_KEYS))]
    options = [name for name in _SHOWN if len({row[name] for row in rows} - {None}) > 1]
    places = list(dict.fromkeys(tuple(row[key] for key in PLACE_KEYS) for row in rows))
    names = [place[0] for place in places]
    labels = [name if names.count(name) == 1 else f"{name} ({n} of {source})" for name, source, n in places]
    header = ["calibration", "blocks", "strategy", *options, "KL, calibration", *(f"KL, {label}" for label in labels)]
    header += ["spread", "overlap of sets", "cost / dense forwards", "of plain greedy", "minutes"]
    table = ResultTable([[*header, "missing blocks (first seed)"]])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in SEARCH_KEYS]), []).append(row)
    for own in sorted(groups.values(), key=lambda own: (own[0]["calibration"], own[0]["num_blocks"])):
        kls = [[row["kl"] for row in own if tuple(row[key] for key in PLACE_KEYS) == place] for place in places]
        searches = list({row["seed"]: row for row in reversed(own)}.values())[::-1]  # a row of each
        first, of_first = searches[0], next(found for found in kls if found)
        costs = [search["block_tokens"] for search in searches]
        dense = [search["dense_forward_block_tokens"] for search in searches]
        plain = [search.get("plain_greedy_block_tokens") for search in searches]
        merged = (f"{absorbed} into {kept}" for kept, absorbed in first["merged_blocks"])
        table.rows.append(
            [
                *(str(first[key]) for key in ("calibration", "num_blocks", "strategy")),
                *("" if first[name] is None else str(first[name]) for name in options),
                f"{stats.mean(search['kl_calibration'] for search in searches):.4f}",
                *(f"{stats.mean(found):.4f}" if found else "" for found in kls),
                # One draw has no spread.
                f"{(max(of_first) - min(of_first)) / stats.mean(of_first):.1%}" if len(of_first) > 1 else "",
                _overlap(searches),
                f"{stats.mean(map(truediv, costs, dense)):.1f}",
                "" if None in plain else f"{stats.mean(map(truediv, costs, plain)):.0%}",
                f"{stats.mean(search['seconds'] for search in searches) / 60:.1f}",
                ", ".join([*map(str, first["removed_blocks"]), *merged]),
            ]
        )
    return table


def _overlap(searches: Sequence[Mapping[str, Any]]) -> str:
    """Mean share of missing blocks that two seeds have in common."""
    sets = [{*row["removed_blocks"], *(absorbed for _, absorbed in row["merged_blocks"])} for row in searches]
    shares = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return f"{stats.mean(shares):.0%}" if shares else ""
