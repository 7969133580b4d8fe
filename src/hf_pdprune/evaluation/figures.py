"""Figures: how every picture of a report begins and ends."""

import os
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """
    A figure without pyplot: nothing global, no display, safe in threads.

    Args:
        width (`float`): In inches.
        height (`float`): In inches.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf-pdprune[plots]") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Writes a PNG as a whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path
