"""The five pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .canvas import save
from .comparison import Comparison
from .plot_bars import communication_figure, throughput_figure, time_figure
from .plot_lines import accuracy_figure, loss_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES = {
    "throughput_comparison": throughput_figure,
    "training_time_comparison": time_figure,
    "loss_curves": loss_figure,
    "accuracy_curves": accuracy_figure,
    "communication_overhead": communication_figure,
}


def draw_plots(comparison: Comparison) -> dict[str, Figure]:
    """All pictures by name, without writing anything. Raises: UserError if matplotlib is not installed."""
    return {name: draw(comparison) for name, draw in _FIGURES.items()}


def write_plots(comparison: Comparison, figures: Mapping[str, Figure] | None = None) -> tuple[Path, ...]:
    """Write `figures` (of :func:`draw_plots`, which is called without them) into ``plots/``; returns their paths.

    Raises: UserError if matplotlib is not installed; OSError.
    """
    folder = comparison.folder / "plots"
    figures = draw_plots(comparison) if figures is None else figures
    return tuple(save(figure, folder / f"{name}.png") for name, figure in figures.items())
