"""HandoverTimes: when what happened in one hand-over; and what several of them say of a link."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..inference import Link


@dataclass(frozen=True)
class HandoverTimes:
    """
    One hand-over, in seconds since the prompt was there.

    Args:
        prefilled (`float`): When prefill was done; where it gives the first token, when that was there.
        frames (`tuple[tuple[float, int], ...]`): When each frame of the payload was ready to be sent, and its bytes;
            one frame where the payload is sent in one piece.
        arrived (`float`): When decode had the last byte.
        unpacked (`float`): When decode had the payload.
        tokens (`tuple[float, ...]`): When decode had each of its tokens; at least two.
    """

    prefilled: float
    frames: tuple[tuple[float, int], ...]
    arrived: float
    unpacked: float
    tokens: tuple[float, ...]

    def __post_init__(self):
        if len(self.tokens) < 2 or not self.frames:
            raise ValueError(
                f"a hand-over has frames and two tokens at least, got {len(self.frames)} and {len(self.tokens)}"
            )

    @property
    def bytes_sent(self) -> int:
        return sum(nbytes for _, nbytes in self.frames)

    @property
    def hand_over(self) -> float:
        """What comes between prefill and decode: what is left to pack and to send, and unpacking; 0 if nothing is."""
        return max(0.0, self.unpacked - self.prefilled)

    @property
    def steps(self) -> list[float]:
        """Times of decode steps."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    def over(self, link: Link) -> "HandoverTimes":
        """The same hand-over over another link: computing takes as long, the frames arrive by the link's model."""
        arrived = link.arrival(self.frames)
        later = arrived - self.arrived
        tokens = tuple(token + later for token in self.tokens)
        return replace(self, arrived=arrived, unpacked=self.unpacked + later, tokens=tokens)


def summarize_hand_overs(
    from_prefill: Sequence[HandoverTimes], from_decode: Sequence[HandoverTimes]
) -> dict[str, float]:
    """
    Medians over hand-overs of the same kind.

    Args:
        from_prefill (`Sequence[HandoverTimes]`): Those where prefill gives the first token.
        from_decode (`Sequence[HandoverTimes]`): Those where decode gives it.

    Returns:
        `dict[str, float]`: `bytes_sent`; in seconds `ttft` (from prefill) and `second_token` (which waits for the
        transfer then), `ttft_decode` and `hand_over` (what of it lies between prefill and decode), `hand_over_share`
        (of `ttft_decode`), and `tpot` (a decode step).
    """
    steps = [step for times in (*from_prefill, *from_decode) for step in times.steps]
    return {
        "bytes_sent": from_prefill[0].bytes_sent,
        "ttft": statistics.median(times.prefilled for times in from_prefill),
        "second_token": statistics.median(times.tokens[0] for times in from_prefill),
        "ttft_decode": statistics.median(times.tokens[0] for times in from_decode),
        "hand_over": statistics.median(times.hand_over for times in from_decode),
        "hand_over_share": statistics.median(times.hand_over / times.tokens[0] for times in from_decode),
        "tpot": statistics.median(steps),
    }


def measured_and_modelled(
    runs: Sequence[dict[str, Any]], links: Sequence[Link]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Rows of `handover.json`, link by link.

    Args:
        runs (`Sequence[dict]`): Hand-overs, each with `link` (its name), `kind` (what is handed over), `sent` (how),
            `first_token` (`"prefill"` or `"decode"`) and `times` ([`HandoverTimes`]).
        links (`Sequence[Link]`): For which the times are modelled, from all runs of a kind.

    Returns:
        `tuple[list[dict], list[dict]]`: Measured and modelled rows: `link`, `kind`, `sent`, and what
        [`summarize_hand_overs`] gives.
    """
    kinds = list(dict.fromkeys((run["kind"], run["sent"]) for run in runs))
    measured = []
    for name in dict.fromkeys(run["link"] for run in runs):
        measured += [_row(name, kind, [run for run in runs if run["link"] == name]) for kind in kinds]
    modelled = []
    for link in links:
        moved = [{**run, "times": run["times"].over(link)} for run in runs]
        modelled += [_row(link.name, kind, moved) for kind in kinds]
    return measured, modelled


def _row(link: str, kind: tuple[str, str], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_first = {
        first: [run["times"] for run in runs if (run["kind"], run["sent"]) == kind and run["first_token"] == first]
        for first in ("prefill", "decode")
    }
    return {"link": link, "kind": kind[0], "sent": kind[1], **summarize_hand_overs(*by_first.values())}
