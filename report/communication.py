"""The report's sentences on communication: what training waits for, what is hidden, what a step would gain."""

from __future__ import annotations

import math

from .comparison import Comparison, Group
from .figures import ranged, ratio, shown
from .throughput import verdict


def communication_lines(comparison: Comparison) -> list[str]:
    lines = [" ".join(_of_one(comparison, group)) for group in comparison.groups]
    for members in comparison.by_size():
        lines.extend(_least_and_most(comparison, members))
    return lines


def _of_one(comparison: Comparison, group: Group) -> list[str]:
    name = comparison.label(group)
    total, exposed, step = (group.comm(part).median for part in ("total_ms", "exposed_ms", "step_ms"))
    if math.isnan(total) and math.isnan(exposed):
        return [f"{name}: {', '.join(result.filename for result in group.results)} has no communication figures."]
    if math.isnan(exposed):
        return [_only_total(group, name, total, step), *_server_parts(group)]
    return [_waiting(group, name), *_hidden(group), *_server_parts(group), *_volume(group, total)]


def _only_total(group: Group, name: str, total: float, step: float) -> str:
    bound = "at most " if group.total_is_upper_bound else ""
    share = "" if math.isnan(step) else f" in a step of {shown(step)} ms ({ratio(total, step) * 100:.0f} %)"
    return f"{name} communicates for {bound}{shown(total)} ms{share}; how much of it training waits for is not known."


def _waiting(group: Group, name: str) -> str:
    exposed, step = group.comm("exposed_ms"), group.comm("step_ms")
    if math.isnan(step.median):
        return f"{name} waits {ranged(exposed, 'ms')} per step for communication."
    without = step.median - exposed.median
    faster = f"{ratio(step.median, without):.2f}x as fast"
    gain = f"; without it a step would take {shown(without)} ms, {faster}" if without > 0 else ""
    text = f"{name} waits {ranged(exposed, 'ms')} for communication in a step of {ranged(step, 'ms')}"
    return f"{text} ({group.comm('share_pct').median:.1f} %){gain}."


def _hidden(group: Group) -> list[str]:
    hidden, total = group.comm("overlapped_ms").median, group.comm("total_ms").median
    if math.isnan(hidden) or not total > 0:
        return []
    if hidden < 0.01 * total:
        return [f"None of its {shown(total)} ms of communication runs beside the computation."]
    bound = "At most " if group.total_is_upper_bound else ""
    why = " (its total is an upper bound: gaps in it count as communication)" if group.total_is_upper_bound else ""
    text = f"{shown(hidden)} ms of its {shown(total)} ms of communication run beside the computation{why}."
    return [bound + text]


def _server_parts(group: Group) -> list[str]:
    parts = [(name, group.comm(f"{name}_ms").median) for name in ("push", "pull", "wait")]
    known = [f"{name} {shown(figure)} ms" for name, figure in parts if not math.isnan(figure)]
    if not group.has_server_traffic:
        return []
    # Longer than the total together: they overlap, or the server's optimizer, which is no communication, ran meanwhile.
    longer = sum(figure for _, figure in parts if not math.isnan(figure)) > 1.01 * group.comm("total_ms").median
    why = " (these overlap or have the server's optimizer time in them: they do not add up)" if longer else ""
    return [f"Its parts: {', '.join(known)}{why}."]


def _volume(group: Group, total: float) -> list[str]:
    size = group.comm("bytes_per_step").median
    if not size > 0:
        return []
    bound = "at least " if group.total_is_upper_bound else ""
    rate = f", {bound}{shown(size / total / 1e6)} GB/s while it communicates" if total > 0 else ""
    return [f"Rank 0 moves {shown(size / 1e6)} MB per step{rate}."]


def _least_and_most(comparison: Comparison, members: list[Group]) -> list[str]:
    known = sorted(
        (group for group in members if not math.isnan(group.comm("exposed_ms").median)),
        key=lambda group: group.comm("exposed_ms").median,
    )
    if len(known) < 2:
        return []
    least, most = known[0], known[-1]
    low, high = least.comm("exposed_ms"), most.comm("exposed_ms")
    return [
        f"{comparison.label(least)} waits least per step ({shown(low.median)} ms), {comparison.label(most)} most "
        f"({shown(high.median)} ms).{verdict(high, low, 'ms')}"
    ]
