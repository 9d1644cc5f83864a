"""Warnings on figures that scatter, or rest on too little: what repeats, epochs, steps and the machine's load tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .comparison import Comparison, plural
from .fields import finite
from .figures import Spread, shown
from .results import Result
from .throughput import span

LOAD_KEY = "load_average"
"""In ``environment``: the host's load average when training began, over the last minute (or 1, 5 and 15 minutes)."""

_NOISY_FROM = 0.10
_FEW_STEPS = 20
_FOREIGN_LOAD_FROM = 1.0


def noise_lines(comparison: Comparison) -> Iterator[str]:
    """One sentence for each sign that figures would come out otherwise another time."""
    yield from _repeats(comparison)
    yield from _epochs(comparison)
    yield from _few_steps(comparison)
    yield from _busy(comparison)


def _repeats(comparison: Comparison) -> Iterator[str]:
    for group in comparison.groups:
        if group.throughput.relative > _NOISY_FROM:
            yield (
                f"{comparison.label(group)} is noisy: {span(group.throughput)} img/s over {group.repeats} repeats, "
                f"{group.throughput.relative * 100:.0f} % of the median. A quieter machine or more repeats would help."
            )


def _epochs(comparison: Comparison) -> Iterator[str]:
    """Of runs without repeats only: with them the spread is known, and is told above."""
    for group in comparison.groups:
        rates = Spread.of(epoch.train_throughput for epoch in group.results[0].epochs)
        if group.repeats == 1 and rates.relative > _NOISY_FROM:
            yield (
                f"{comparison.label(group)} is noisy: {span(rates)} img/s over its {rates.count} epochs, "
                f"{rates.relative * 100:.0f} % of the median. Repeats (--repeats 3) would show the spread."
            )


def _few_steps(comparison: Comparison) -> Iterator[str]:
    few = [result for result in comparison.results if result.measured_steps < _FEW_STEPS]
    if not few:
        return
    counts = sorted({int(result.measured_steps) for result in few})
    steps = plural(counts[0], "step") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"
    which = "all runs" if len(few) == len(comparison.results) else ", ".join(result.filename for result in few)
    warm_up = " (0: nothing but warm-up, which then counts)" if counts[0] == 0 else ""
    yield f"The times of {which} are means over {steps}{warm_up}: too few to trust small differences."


def _busy(comparison: Comparison) -> Iterator[str]:
    """Load that is not explained by the processes of the run before, which the average still remembers."""
    own = max(map(_own_load, comparison.results))
    busy = [result for result in comparison.results if _load(result) > own + _FOREIGN_LOAD_FROM]
    if busy:
        worst = max(busy, key=_load)
        yield (
            f"The machine had other work: a load average of {shown(_load(worst))} when {worst.filename} began, where "
            f"a run here accounts for {shown(own)} at most ({len(busy)} of {len(comparison.results)} runs)."
        )


def _load(result: Result) -> float:
    value = result.environment.get(LOAD_KEY)
    return finite(value[0] if isinstance(value, list) and value else value)


def _own_load(result: Result) -> float:
    """Threads that a run keeps busy: of all its processes, and of their loader processes."""
    threads = finite(result.environment.get("omp_num_threads"))
    loaders = finite(_section(result.config, "data").get("num_workers"))
    per_process = (1 if math.isnan(threads) else threads) + (0 if math.isnan(loaders) else loaders)
    return result.world_size * per_process


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """``data`` of a configuration, with or without a class path."""
    section = config.get(key)
    if not isinstance(section, Mapping):
        return {}
    arguments = section.get("init_args")
    return arguments if isinstance(arguments, Mapping) else section
