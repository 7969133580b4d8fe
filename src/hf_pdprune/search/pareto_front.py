"""ParetoFront: loss against blocks per stage, from one search."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefact_file import write_artefact
from ..plan import PruningPlan


JSON_FILE_NAME = "pareto_front.json"
PNG_FILE_NAME = "pareto_front.png"
FRONT_FILE_NAMES = (JSON_FILE_NAME, PNG_FILE_NAME)


@dataclass(frozen=True)
class ParetoPoint:
    """
    A plan on the front.

    Args:
        plan ([`PruningPlan`]): The plan.
        kl (`float`): Its KL to the dense model per completion token of the calibration set.
    """

    plan: PruningPlan
    kl: float

    @property
    def num_prefill_blocks(self) -> int:
        """Blocks that prefill does without."""
        return len(self.plan.prefill.skipped_blocks)

    @property
    def num_decode_blocks(self) -> int:
        """Blocks that decode does without."""
        return len(self.plan.decode.missing_blocks)

    def is_beaten_by(self, other: "ParetoPoint") -> bool:
        """Whether `other` is as good in loss and in the blocks of each stage, and better in one of these."""
        own = (self.num_prefill_blocks, self.num_decode_blocks, -self.kl)
        others = (other.num_prefill_blocks, other.num_decode_blocks, -other.kl)
        return own != others and all(theirs >= mine for theirs, mine in zip(others, own, strict=True))


class ParetoFront:
    """
    The plans among some that no other one beats in both loss and blocks.

    Args:
        points (`Iterable[ParetoPoint]`): Those that were measured.
    """

    def __init__(self, points: Iterable[ParetoPoint]):
        points = list(points)
        front = [point for point in points if not any(point.is_beaten_by(other) for other in points)]
        self.points = sorted(front, key=lambda point: (point.num_prefill_blocks, point.num_decode_blocks, point.kl))

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_model": self.points[0].plan.base_model if self.points else None,
            "points": [
                {
                    "num_prefill_blocks": point.num_prefill_blocks,
                    "num_decode_blocks": point.num_decode_blocks,
                    "kl": point.kl,
                    "prefill": point.plan.prefill.to_dict(),
                    "decode": point.plan.decode.to_dict(),
                }
                for point in self.points
            ],
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `pareto_front.json`, and where matplotlib is installed `pareto_front.png`."""
        write_artefact(Path(folder) / JSON_FILE_NAME, self.to_dict())
        try:
            self.plot(Path(folder) / PNG_FILE_NAME)
        except ImportError:
            return

    def plot(self, path: str | os.PathLike) -> Path:
        """
        Draws loss against the blocks that the stages do without, of prefill and decode together. A point says how many
        each of them lacks, prefill / decode.

        Raises:
            `ImportError`: If matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install hf-pdprune[plots]") from error
        figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")  # without pyplot: nothing global, no display
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points = sorted(self.points, key=lambda point: (point.num_prefill_blocks + point.num_decode_blocks, point.kl))
        totals, losses = zip(*((p.num_prefill_blocks + p.num_decode_blocks, p.kl) for p in points), strict=True)
        axes.plot(totals, losses, "o-", color="#2f6fb0", markersize=5)
        for point, total in zip(points, totals, strict=True):
            label = f"{point.num_prefill_blocks} / {point.num_decode_blocks}"
            axes.annotate(label, (total, point.kl), (-4, 5), textcoords="offset points", fontsize=8, ha="right")
        axes.set_xlabel("blocks that the stages do without, both together (prefill / decode)")
        axes.set_ylabel("KL to the dense model\nper completion token (nats)")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08, y=0.1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
        return path
