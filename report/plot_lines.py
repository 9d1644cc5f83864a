"""Line charts: how the loss falls step by step, and how accuracy rises epoch by epoch.

Strategies that compute the same have the same curve. So that none hides another, the lower ones are drawn wider,
those on top of them narrower and dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

from .canvas import clean, folded, new_figure, say, title
from .comparison import Comparison, Group, plural
from .curves import finite_values, pointwise_median, running_mean, window_of
from .figures import shown_loss
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_MOST_RAW_POINTS = 4000
_MARKERS_PER_CURVE = 8
_LOG_FROM_RATIO = 100
_EQUAL_FROM = 0.01


@final
@dataclass(frozen=True)
class _Curve:
    """A group's line."""

    group: Group
    x: list[float]
    y: list[float]
    """The median over the repeats, smoothed."""
    repeats: list[list[float]]
    """Each repeat, smoothed; empty for one."""
    raw: Sequence[float] = ()
    """What was smoothed, where there is one repeat."""
    last: str = ""
    """Its outcome, for the legend."""

    @property
    def is_empty(self) -> bool:
        return not finite_values(self.y)


_Panels: TypeAlias = "list[tuple[Axes, list[_Curve]]]"


def loss_figure(comparison: Comparison) -> Figure:
    """Over steps; over epochs if no file has a loss for every step."""
    per_step = any(result.all_losses for result in comparison.results)
    window = max(window_of(len(result.all_losses)) for result in comparison.results)
    read = _loss_per_step if per_step else _loss_per_epoch
    figure, panels = _panels(comparison, read)
    for axes, curves in panels:
        _draw(axes, curves, "no loss" + (" per step" if per_step else ""))
        axes.set(xlabel="training step" if per_step else "epoch", ylabel="training loss")
        _limit_losses(axes, curves)
    smoothed = f"running mean over {plural(window, 'step')}" if window > 1 else ""
    _finish(figure, comparison, panels, "Training loss", smoothed)
    return figure


def accuracy_figure(comparison: Comparison) -> Figure:
    figure, panels = _panels(comparison, _accuracy_per_epoch)
    for axes, curves in panels:
        _draw(axes, curves, "no validation accuracy")
        axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
        _limit_accuracies(axes, curves)
    _finish(figure, comparison, panels, "Validation accuracy", "")
    return figure


def _loss_per_step(group: Group) -> _Curve:
    smooth = [running_mean(r.all_losses, window_of(len(r.all_losses))) for r in group.results]
    median = pointwise_median(smooth)
    raw = group.results[0].all_losses if group.repeats == 1 else ()
    steps = [float(step) for step in range(1, len(median) + 1)]
    return _Curve(group, steps, median, smooth if group.repeats > 1 else [], raw, _last(median, "final"))


def _loss_per_epoch(group: Group) -> _Curve:
    x, curves = _per_epoch(group, lambda result: {epoch.epoch: epoch.train_loss for epoch in result.epochs})
    median = pointwise_median(curves)
    return _Curve(group, x, median, curves if len(curves) > 1 else [], last=_last(median, "final"))


def _accuracy_per_epoch(group: Group) -> _Curve:
    x, curves = _per_epoch(group, lambda result: {epoch.epoch: epoch.val_accuracy for epoch in result.epochs})
    best = group.best_accuracy.median
    last = "" if math.isnan(best) else f"best {best:.2f} %"
    return _Curve(group, x, pointwise_median(curves), curves if len(curves) > 1 else [], last=last)


def _per_epoch(group: Group, read: Callable[[Result], dict[int, float]]) -> tuple[list[float], list[list[float]]]:
    """The epochs that any repeat has, and each repeat's values there."""
    values = [read(result) for result in group.results]
    epochs = sorted(set().union(*values))
    return [float(epoch) for epoch in epochs], [[of.get(epoch, math.nan) for epoch in epochs] for of in values]


def _last(values: Sequence[float], word: str) -> str:
    there = finite_values(values)
    return f"{word} {shown_loss(there[-1])}" if there else ""


def _panels(comparison: Comparison, read: Callable[[Group], _Curve]) -> tuple[Figure, _Panels]:
    """One panel, or in a sweep one for each number of training processes."""
    groups = comparison.by_size()
    columns = len(groups) if len(groups) <= 3 else 2
    lines = math.ceil(len(groups) / columns)
    most = max(map(len, groups))
    figure = new_figure(9.0 if columns == 1 else 4.6 * columns, 4.0 * lines + 1.0 + 0.3 * math.ceil(most / 3))
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(groups) :]:
        axes.remove()
    return figure, [(axes, [read(group) for group in members]) for axes, members in zip(grid, groups, strict=False)]


def _draw(axes: Axes, curves: list[_Curve], nothing: str) -> None:
    drawn = [curve for curve in curves if not curve.is_empty]
    for index, curve in enumerate(drawn):
        above = sum(_look_equal(curve, other) for other in drawn[index + 1 :])
        _draw_curve(axes, curve, above, order=index, of=len(drawn))
    absent = [curve.group.method for curve in curves if curve.is_empty]
    if absent:
        say(axes, "\n".join(f"{nothing}: {name}" for name in absent), among_data=bool(drawn))
    clean(axes, "y")
    _limit_x(axes, curves)


def _look_equal(curve: _Curve, other: _Curve) -> bool:
    """True if the second, drawn over the first, would hide it."""
    values = finite_values(curve.y)
    distances = finite_values([abs(a - b) for a, b in zip(curve.y, other.y, strict=False)])
    close = _EQUAL_FROM * (max(values) - min(values))
    return bool(distances) and sum(distance <= close for distance in distances) > len(distances) / 2


def _draw_curve(axes: Axes, curve: _Curve, above: int, *, order: int, of: int) -> None:
    """`above` other curves will lie on top of this one, which is the `order`-th `of` all."""
    color = curve.group.style.color
    if curve.raw:
        step = math.ceil(len(curve.raw) / _MOST_RAW_POINTS)
        axes.plot(curve.x[::step], curve.raw[::step], color=color, linewidth=0.6, alpha=0.25, zorder=1)
    for repeat in curve.repeats:
        axes.plot(curve.x[: len(repeat)], repeat, color=color, linewidth=0.8, alpha=0.5, zorder=2)
    every = max(1, len(curve.x) // _MARKERS_PER_CURVE)
    axes.plot(
        curve.x,
        curve.y,
        **_look(curve),
        linewidth=min(1.8 + 1.5 * above, 7),
        markersize=min(5.5 + 2.5 * above, 14),
        markeredgecolor="white",
        markeredgewidth=0.8,
        # Shifted against each other, so that markers of equal curves do not lie on top of each other.
        markevery=(min(len(curve.x) - 1, every * order // of), every),
        zorder=3 + order,
        # Within the limits anyway, and markers on the axes stay whole.
        clip_on=False,
    )


def _limit_losses(axes: Axes, curves: list[_Curve]) -> None:
    """From the curves and nearly all of the raw values: one wild step must not flatten everything else."""
    smooth = [value for curve in curves for line in (curve.y, *curve.repeats) for value in finite_values(line)]
    raw = sorted(value for curve in curves for value in finite_values(curve.raw))
    cut = len(raw) // 100
    values = smooth + raw[cut : len(raw) - cut]
    if not values:
        return
    low, high = min(values), max(values)
    if min(smooth) > 0 and max(smooth) > _LOG_FROM_RATIO * min(smooth):
        axes.set_yscale("log")
        return
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def _limit_accuracies(axes: Axes, curves: list[_Curve]) -> None:
    values = [value for curve in curves for line in (curve.y, *curve.repeats) for value in finite_values(line)]
    if values:
        low = 0.0 if min(values) < 40 else math.floor(min(values) / 10 - 0.5) * 10
        # A little above 100, so that the marker of a perfect score is whole.
        axes.set_ylim(low, min(math.ceil((max(values) + 2) / 10) * 10, max(101, max(values))))


def _limit_x(axes: Axes, curves: list[_Curve]) -> None:
    """From the first step or epoch to the last; a single one stands in the middle."""
    from matplotlib.ticker import MaxNLocator

    x = [value for curve in curves for value in curve.x]
    if x:
        margin = 0.02 * (max(x) - min(x)) or 0.5
        axes.set_xlim(min(x) - margin, max(x) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _finish(figure: Figure, comparison: Comparison, panels: _Panels, text: str, detail: str) -> None:
    repeats = max(group.repeats for group in comparison.groups)
    spread = f"thick: median of {plural(repeats, 'repeat')}, thin: each of them" if repeats > 1 else "one run each"
    title(figure, text, "; ".join(part for part in (detail, spread) if part))
    if len(panels) > 1:
        for axes, curves in panels:
            axes.set_title(plural(curves[0].group.training_processes, "training process", "es"), fontsize=10)
    entries = {curve.group.method: curve for _, curves in panels for curve in curves if not curve.is_empty}
    if entries:
        names = [_entry(comparison, curve, with_outcome=len(panels) == 1) for curve in entries.values()]
        handles = [_handle(curve) for curve in entries.values()]
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9, handlelength=4)


def _entry(comparison: Comparison, curve: _Curve, *, with_outcome: bool) -> str:
    name = folded(curve.group.method)
    if not with_outcome:
        return name
    size = plural(curve.group.training_processes, "process", "es") if len(comparison.process_counts) > 1 else ""
    return f"{name}\n{', '.join(part for part in (size, curve.last) if part)}".rstrip()


def _handle(curve: _Curve) -> Line2D:
    """The curve's colour, dashes and marker in one size for all: in the legend nothing overlaps."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linewidth=2, markersize=7, markeredgecolor="white", **_look(curve))


def _look(curve: _Curve) -> dict[str, Any]:
    style = curve.group.style
    return {"color": style.color, "marker": style.marker, "linestyle": (0, style.dashes) if style.dashes else "-"}
