"""The five pictures of a comparison."""

from __future__ import annotations

from pathlib import Path

from .canvas import save
from .comparison import Comparison
from .plot_bars import communication_figure, throughput_figure, time_figure
from .plot_lines import accuracy_figure, loss_figure

_FIGURES = {
    "throughput_comparison.png": throughput_figure,
    "training_time_comparison.png": time_figure,
    "loss_curves.png": loss_figure,
    "accuracy_curves.png": accuracy_figure,
    "communication_overhead.png": communication_figure,
}


def write_plots(comparison: Comparison) -> tuple[Path, ...]:
    """Draw all pictures into ``plots/`` of the comparison's folder and return their paths.

    Raises: UserError if matplotlib is not installed.
    """
    folder = comparison.folder / "plots"
    return tuple(save(draw(comparison), folder / name) for name, draw in _FIGURES.items())
