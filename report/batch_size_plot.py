"""Images per second and memory against the batch size, with the limit and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .canvas import GREY, clean, new_figure, save

_SPEED, _MEMORY, _LIMIT = "#0072B2", "#009E73", "#D55E00"
_SIZES_WITH_TICK = 12


def write_batch_size_plot(
    trials: Sequence[tuple[int, float | None, float]], best: int, limit_gib: float, path: Path
) -> Path:
    """Draw trials (batch size, images/s or None for one that did not fit, peak GiB) by batch size; returns the path.

    Raises: UserError if matplotlib is not installed; OSError.
    """
    figure = new_figure(8.0, 5.5)
    speed, memory = figure.subplots(2, sharex=True)
    fitting = [(size, images) for size, images, _ in trials if images is not None]
    speed.plot(*zip(*fitting, strict=True), color=_SPEED, marker="o")
    chosen = dict(fitting)[best]
    speed.plot([best], [chosen], marker="o", markersize=13, fillstyle="none", color=_LIMIT, markeredgewidth=2)
    speed.annotate(f"best: {best}", (best, chosen), (0, -20), textcoords="offset points", ha="center", color=_LIMIT)
    speed.set(ylabel="images/s, all training processes", ylim=(0, 1.15 * chosen))
    _draw_memory(memory, trials, limit_gib)
    memory.set_xlabel("batch size, images per training process and step")
    memory.set_xscale("log", base=2)
    ticks = [size for size, _, _ in trials][-_SIZES_WITH_TICK:]
    memory.set_xticks(ticks, [str(size) for size in ticks], rotation=45)
    memory.minorticks_off()
    for axes in (speed, memory):
        clean(axes, "y")
    figure.suptitle("Batch size", x=0.01, ha="left", fontsize=13, fontweight="bold")
    return save(figure, path)


def _draw_memory(axes: object, trials: Sequence[tuple[int, float | None, float]], limit_gib: float) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    fitting = [(size, gib) for size, images, gib in trials if images is not None]
    others = [(size, gib) for size, images, gib in trials if images is None]
    axes.plot(*zip(*fitting, strict=True), color=_MEMORY, marker="o")
    if others:
        axes.plot(*zip(*others, strict=True), color=GREY, marker="x", linestyle="", label="did not fit")
        axes.legend(frameon=False, loc="upper left")
    highest = max(gib for _, _, gib in trials)
    axes.set(ylabel="peak memory, GiB", ylim=(0, 1.2 * max(highest, min(limit_gib, 2 * highest))))
    if limit_gib <= axes.get_ylim()[1]:
        axes.axhline(limit_gib, color=_LIMIT, linestyle="--")
        axes.annotate("limit", (1, limit_gib), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", color=_LIMIT)  # fmt: skip
