"""The report in short: who won and by how much, what communication costs, whether learning agrees, and where it ran."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .agreement import agreement_of
from .circumstances import value_text
from .comparison import Comparison, Group, plural
from .fields import one_line
from .figures import ranged, ratio, shown
from .throughput import span


def summary_lines(comparison: Comparison) -> list[str]:
    """A sentence or two on each question; the sections below say on what they rest."""
    lines = [_winner(comparison, members) for members in comparison.by_size()]
    lines += [_waiting(comparison), _agreement(comparison), _place(comparison)]
    return [line for line in lines if line]


def _winner(comparison: Comparison, members: Sequence[Group]) -> str:
    ranked = sorted((g for g in members if g.throughput.median > 0), key=lambda group: -group.throughput.median)
    where = f"On {plural(members[0].training_processes, 'process', 'es')}: " if comparison.is_sweep else ""
    if not ranked:
        return f"{where}no run has a throughput figure, so no strategy is the fastest."
    first = ranked[0]
    if len(ranked) == 1:
        return f"{where}{first.method} is the only one with a throughput: {_rate(first)}. There is nothing to beat."
    return where + _lead(first, ranked[1]) + _over_baseline(comparison, first, ranked[1])


def _lead(first: Group, second: Group) -> str:
    ours, theirs = first.throughput, second.throughput
    factor = f"{ratio(ours.median, theirs.median):.2f} times {second.method}, the next"
    if ours.count < 2 or theirs.count < 2:
        who = first.method if ours.count < 2 else second.method
        return (
            f"{first.method} is the fastest with {_rate(first)}, {factor}. Whether that is more than noise is not "
            f"known: {who} ran once."
        )
    if ours.overlaps(theirs):
        return (
            f"No strategy is clearly the fastest. {first.method} is ahead with {_rate(first)}, {factor}, but its "
            f"repeats overlap with those of {second.method} ({span(theirs)} img/s)."
        )
    beyond = (ours.low / theirs.high - 1) * 100 if theirs.high > 0 else math.nan
    return (
        f"{first.method} wins with {_rate(first)}, {factor}; that is {beyond:.1f} % beyond the spread: its slowest "
        f"repeat ({shown(ours.low)} img/s) against the fastest one of {second.method} ({shown(theirs.high)} img/s)."
    )


def _over_baseline(comparison: Comparison, first: Group, second: Group) -> str:
    baseline = comparison.baseline_of(first)
    if baseline is None or baseline in (first, second):
        return ""
    return f" It is {comparison.speed_up(first).median:.2f} times Baseline DDP."


def _rate(group: Group) -> str:
    rate = group.throughput
    return f"{shown(rate.median)} img/s" + (f" ({span(rate)} over {rate.count} repeats)" if rate.count > 1 else "")


def _waiting(comparison: Comparison) -> str:
    shares = [(comparison.label(group), group.comm("share_pct")) for group in comparison.groups]
    known = [(name, share) for name, share in shares if not math.isnan(share.median)]
    if not known:
        return "How much of a step training waits for communication is in none of the files."
    parts = (f"{ranged(share, '%', 1)} under {name}" for name, share in known)
    return f"Of a step, training waits for communication {', '.join(parts)}."


def _agreement(comparison: Comparison) -> str:
    found = [each for group in comparison.groups if (each := agreement_of(comparison, group)) is not None]
    parts = []
    for agrees, one, several in (
        (True, "agrees with", "agree with"),
        (False, "does not agree with", "do not agree with"),
        (None, "cannot be judged against", "cannot be judged against"),
    ):
        these = [each for each in found if each.agrees is agrees]
        if these:
            others = _listed([comparison.label(each.reference) for each in these])
            verb = one if len(these) == 1 else several
            parts.append(f"{_listed([comparison.label(each.group) for each in these])} {verb} {others}")
    return f"In the course of the training loss, {'; '.join(parts)}." if parts else ""


def _listed(names: Sequence[str]) -> str:
    """``A, B and C``, each once."""
    unique = list(dict.fromkeys(names))
    return " and ".join(part for part in (", ".join(unique[:-1]), unique[-1]) if part)


def _place(comparison: Comparison) -> str:
    counts = _listed([str(count) for count in comparison.process_counts])
    servers = [group for group in comparison.groups if group.server_processes]
    machine = _value(comparison, "cpu_model")
    cores = _value(comparison, "cpu_count")
    parts = [
        f"{counts} training process{'' if counts == '1' else 'es'}",
        f"(and one that serves, under {_listed([group.method for group in servers])})" if servers else "",
        f"on {machine}" if machine else "",
        f"with {cores} cores" if cores else "",
        f"over {backend}" if (backend := _value(comparison, "backend")) else "",
    ]
    versions = [f"{name} {number}" for name in ("torch", "lightning") if (number := _value(comparison, name))]
    where = " ".join(part for part in parts if part)
    return f"It ran with {', '.join([where, *versions])}."


def _value(comparison: Comparison, key: str) -> str:
    """What the environments say, every value once; empty if they say nothing."""
    values = (value_text(result.environment[key]) for result in comparison.results if key in result.environment)
    return one_line(" or ".join(dict.fromkeys(value for value in values if value != "none")))
