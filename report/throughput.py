"""The report's sentences on speed: which method is faster, by how much, and whether that is more than noise."""

from __future__ import annotations

import math
from itertools import pairwise

from .comparison import Comparison, Group, plural
from .figures import Spread, ranged, shown


def throughput_lines(comparison: Comparison) -> list[str]:
    lines = []
    for members in comparison.by_size():
        lines.extend(_ranking(comparison, members))
        lines.extend(_against_baseline(comparison, group) for group in members if comparison.has_other_baseline(group))
    return lines + _spread_lines(comparison)


def scaling_lines(comparison: Comparison) -> list[str]:
    """How throughput grows with training processes, for each method that ran with several numbers of them."""
    if not comparison.is_sweep:
        return [_no_sweep(comparison)]
    methods = dict.fromkeys(group.method for group in comparison.groups)
    return [line for method in methods for line in _scaling_of(comparison.sizes_of(method))]


def verdict(ours: Spread, theirs: Spread, unit: str) -> str:
    """Whether a difference is more than the repeats' spread; empty where there is no spread to tell by."""
    if ours.count < 2 or theirs.count < 2:
        return ""
    ranges = f"{span(ours)} and {span(theirs)} {unit}".rstrip()
    if ours.overlaps(theirs):
        return f" The ranges over the repeats overlap ({ranges}): the difference is within the spread."
    return f" The ranges over the repeats do not overlap ({ranges}): the difference is beyond the spread."


def span(spread: Spread) -> str:
    return f"{shown(spread.low)} .. {shown(spread.high)}"


def _ranking(comparison: Comparison, members: list[Group]) -> list[str]:
    ranked = sorted(
        (group for group in members if group.throughput.median > 0), key=lambda group: -group.throughput.median
    )
    unknown = [f"{comparison.label(group)} has no throughput figure." for group in members if group not in ranked]
    if not ranked:
        return unknown
    fastest, slowest = ranked[0], ranked[-1]
    first = f"{comparison.label(fastest)} with {shown(fastest.throughput.median)} img/s"
    if fastest is slowest:
        return [
            f"{first} ({shown(fastest.epoch_s.median)} s per epoch) stands alone: nothing to compare with.",
            *unknown,
        ]
    share = slowest.throughput.median / fastest.throughput.median
    last = f"{comparison.label(slowest)} with {shown(slowest.throughput.median)} img/s, {share:.2f} times that"
    return [f"Fastest is {first}; slowest is {last}.", *unknown]


def _against_baseline(comparison: Comparison, group: Group) -> str:
    baseline = comparison.baseline_of(group)
    factor = comparison.speed_up(group).median
    if baseline is None or math.isnan(factor):
        return f"{comparison.label(group)} cannot be compared with Baseline DDP: a throughput figure is absent."
    percent = (factor - 1) * 100
    change = "as much as" if abs(percent) < 0.05 else f"{abs(percent):.1f} % {'more' if percent > 0 else 'less'} than"
    return (
        f"{comparison.label(group)} handles {shown(group.throughput.median)} img/s, {change} "
        f"{comparison.label(baseline)} ({factor:.2f}x); an epoch takes {ranged(group.epoch_s, 's')} "
        f"against {ranged(baseline.epoch_s, 's')}.{verdict(group.throughput, baseline.throughput, 'img/s')}"
    )


def _spread_lines(comparison: Comparison) -> list[str]:
    lines = []
    if not any(comparison.baseline_of(group) for group in comparison.groups):
        lines.append("There is no Baseline DDP result here, hence no speed-up.")
    repeated = [group for group in comparison.groups if group.throughput.count > 1]
    once = [comparison.label(group) for group in comparison.groups if group.throughput.count == 1]
    if repeated:
        widest = max(repeated, key=lambda group: group.throughput.relative)
        lines.append(
            f"Over its {widest.throughput.count} repeats {comparison.label(widest)} varied most: "
            f"{span(widest.throughput)} img/s, {widest.throughput.relative * 100:.1f} % of the median."
        )
    if once:
        who = ", ".join(once) if repeated else "Every method"
        lines.append(f"{who} ran once: one run shows no spread, so small differences may be noise (--repeats 3 tells).")
    return lines


def _no_sweep(comparison: Comparison) -> str:
    counts = comparison.process_counts
    example = f"gradsync compare --devices {counts[0]},{2 * counts[0]}"
    if len(counts) == 1:
        where = plural(counts[0], "training process", "es")
        return f"All results are from {where}: one count tells nothing about scaling ({example} measures it)."
    sizes = "; ".join(comparison.label(group) for group in comparison.groups)
    return f"Each method ran with one number of training processes only ({sizes}): no scaling ({example} measures it)."


def _scaling_of(groups: list[Group]) -> list[str]:
    known = [group for group in groups if group.throughput.median > 0]
    if len(known) < 2:
        sizes = ", ".join(str(group.training_processes) for group in groups)
        return [f"{groups[0].method} has a throughput for fewer than two numbers of training processes ({sizes})."]
    return [_step_up(known[0], group) for group in known[1:]] + _turning_point(known)


def _step_up(small: Group, large: Group) -> str:
    ideal = large.training_processes / small.training_processes
    gain = large.throughput.median / small.throughput.median
    return (
        f"{small.method}: from {small.training_processes} to {large.training_processes} training processes "
        f"{shown(small.throughput.median)} -> {shown(large.throughput.median)} img/s, {gain:.2f}x of an ideal "
        f"{ideal:.2f}x (efficiency {gain / ideal * 100:.0f} %)."
    )


def _turning_point(groups: list[Group]) -> list[str]:
    return [
        f"{small.method} is slower with {large.training_processes} training processes than with "
        f"{small.training_processes}."
        for small, large in pairwise(groups)
        if large.throughput.median < small.throughput.median
    ]
