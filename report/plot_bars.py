"""Bar charts: horizontal, so that long method names stand beside their bars and never overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .canvas import clean, folded, new_figure, plain, title
from .comparison import Comparison, Group, plural
from .figures import Spread, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN = 9.0
_BAR_HEIGHT = 0.62
_GAP_BETWEEN_SIZES = 0.5
_ROOM_FOR_LABELS = 1.35

# Light and dark in turn: what waits must stand out from its neighbours in grey print as well.
_PARTS = (
    ("data_ms", "data", "#56B4E9", "..."),
    ("compute_ms", "compute", "#D9D9D9", ""),
    ("exposed_ms", "exposed communication", "#D55E00", "//"),
    ("optimizer_ms", "optimizer", "#F0E442", "\\\\"),
    ("other_ms", "other", "#FFFFFF", ""),
)
_PART_EDGE = "#545454"
"""Not GREY: that turns light on a dark page, these bars do not."""
_UNKNOWN_PART = ("communication, hidden part unknown", "#E9A06C", "xx")
_REST = ("rest of the step", "#EEEEEE", "")


def throughput_figure(comparison: Comparison) -> Figure:
    def label(group: Group) -> str:
        speed_up = comparison.speed_up(group).median
        return shown(group.throughput.median) + ("" if math.isnan(speed_up) else f"  ({speed_up:.2f}x)")

    relative = any(comparison.baseline_of(group) for group in comparison.groups)
    figure = _bar_figure(comparison, lambda group: group.throughput, label, "images/s, all training processes together")
    title(figure, "Training throughput", _subtitle(comparison, "(x): relative to Baseline DDP" if relative else ""))
    return figure


def time_figure(comparison: Comparison) -> Figure:
    def label(group: Group) -> str:
        return shown(group.epoch_s.median, "s")

    figure = _bar_figure(comparison, lambda group: group.epoch_s, label, "seconds per epoch")
    title(figure, "Training time per epoch", _subtitle(comparison, "shorter is better"))
    return figure


def communication_figure(comparison: Comparison) -> Figure:
    """Where the time of an average step goes, and what part of it training waits for communication."""
    rows = _rows(comparison)
    figure = new_figure(_WIDTH_IN, _height(rows) + 0.8)
    axes = figure.subplots()
    longest = max(_draw_step(axes, row, group) for row, group in rows)
    _finish(axes, rows, longest, "milliseconds per step (rank 0)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    title(
        figure, "Where the time of a training step goes", _subtitle(comparison, "hidden: runs beside the computation")
    )
    return figure


def _bar_figure(
    comparison: Comparison, spread_of: Callable[[Group], Spread], label: Callable[[Group], str], axis: str
) -> Figure:
    rows = _rows(comparison)
    figure = new_figure(_WIDTH_IN, _height(rows))
    axes = figure.subplots()
    for row, group in rows:
        spread, style = spread_of(group), group.style
        if math.isnan(spread.median):
            _label(axes, row, 0.0, "no figure")
            continue
        axes.barh(row, spread.median, _BAR_HEIGHT, color=style.color, hatch=style.hatch, edgecolor="white")
        _whiskers(axes, row, spread)
        _label(axes, row, spread.high, label(group))
    ends = (spread_of(group).high for _, group in rows)
    _finish(axes, rows, max((end for end in ends if not math.isnan(end)), default=0.0), axis)
    return figure


def _draw_step(axes: Axes, row: float, group: Group) -> float:
    """Draw one stacked bar; returns where it and its whiskers end, in ms."""
    left = 0.0
    for length, text, color, hatch in _step_parts(group):
        if length > 0:
            bar = axes.barh(row, length, _BAR_HEIGHT, left, label=text, color=color)
            for patch in bar:
                patch.set(hatch=hatch, edgecolor=_PART_EDGE, linewidth=0.6)
            left += length
    if not left:
        _label(axes, row, 0.0, "no figures")
        return 0.0
    step = group.comm("step_ms")
    _whiskers(axes, row, step)
    end = max(left, step.high) if step.count > 1 else left
    _label(axes, row, end, _step_label(group))
    return end


def _step_parts(group: Group) -> list[tuple[float, str, str, str]]:
    """Length in ms, text, colour and hatch of each part. Some files know only how long communication was."""
    if not math.isnan(group.comm("exposed_ms").median):
        return [(group.comm(name).median, text, color, hatch) for name, text, color, hatch in _PARTS]
    total, step = group.comm("total_ms").median, group.comm("step_ms").median
    rest = step if math.isnan(total) else step - total
    return [(total, *_UNKNOWN_PART), (rest, *_REST)]


def _step_label(group: Group) -> str:
    step, share, exposed, hidden, total = (
        group.comm(name).median for name in ("step_ms", "share_pct", "exposed_ms", "overlapped_ms", "total_ms")
    )
    lines = [] if math.isnan(step) else [shown(step, "ms")]
    if not math.isnan(exposed):
        lines.append(f"{shown(exposed)} exposed" + ("" if math.isnan(share) else f" ({share:.0f} %)"))
        if hidden > 0:
            lines.append(f"{'≤ ' if group.total_is_upper_bound else ''}{shown(hidden)} hidden")
    elif not math.isnan(total):
        lines.append(f"{shown(total)} communication")
    return "\n".join(lines)


def _whiskers(axes: Axes, row: float, spread: Spread) -> None:
    from matplotlib.patheffects import withStroke

    if spread.count > 1:
        reach = [[spread.median - spread.low], [spread.high - spread.median]]
        drawn = axes.errorbar(spread.median, row, xerr=reach, fmt="none", ecolor="black", elinewidth=1.4, capsize=4)
        _, ends, lines = drawn.lines
        for part in (*ends, *lines):
            # An edge of paper, so that they are seen on dark bars as well, and on light ones of a dark page.
            part.set_path_effects([withStroke(linewidth=3.4, foreground="white")])


def _label(axes: Axes, row: float, end: float, text: str) -> None:
    axes.annotate(plain(text), (end, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)


def _rows(comparison: Comparison) -> list[tuple[float, Group]]:
    """Vertical positions from the top. In a sweep, methods with as many processes stand together."""
    if not comparison.is_sweep:
        return [(float(row), group) for row, group in enumerate(comparison.groups)]
    groups = sorted(comparison.groups, key=lambda group: group.training_processes)
    sizes = comparison.process_counts
    return [
        (row + _GAP_BETWEEN_SIZES * sizes.index(group.training_processes), group) for row, group in enumerate(groups)
    ]


def _finish(axes: Axes, rows: list[tuple[float, Group]], longest: float, axis: str) -> None:
    axes.set_xlim(0, longest * _ROOM_FOR_LABELS or 1)
    axes.set_xlabel(axis)
    axes.set_yticks([row for row, _ in rows], [f"{folded(group.method)}\n{_processes(group)}" for _, group in rows])
    axes.set_ylim(rows[-1][0] + 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    clean(axes, "x")


def _processes(group: Group) -> str:
    return group.processes if group.server_processes else plural(group.training_processes, "process", "es")


def _height(rows: list[tuple[float, Group]]) -> float:
    return 1.5 + 0.75 * max(2.0, rows[-1][0] + 1)


def _subtitle(comparison: Comparison, text: str) -> str:
    repeats = max(group.repeats for group in comparison.groups)
    spread = f"median of {plural(repeats, 'repeat')}, whiskers: smallest to largest" if repeats > 1 else "one run each"
    return "; ".join(part for part in (text, spread) if part)
