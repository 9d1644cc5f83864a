"""Two folders of results put side by side: what changed for each method, and whether repeats explain it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

from .comparison import Comparison, Group, plural
from .figures import Spread, ratio

_APART = ("better", "worse")


@final
@dataclass(frozen=True)
class Change:
    """One figure of one method, before and after."""

    figure: str
    """With its unit, such as ``throughput (img/s)``."""
    before: Spread
    after: Spread
    more_is_better: bool

    @cached_property
    def ratio(self) -> Spread:
        """After in terms of before: of the medians, and the widest range that the repeats allow.

        The folders' repeats took no turns with each other, so no repeat of one belongs to one of the other.
        """
        middle = ratio(self.after.median, self.before.median)
        if math.isnan(middle):
            return Spread()
        low, high = ratio(self.after.low, self.before.high), ratio(self.after.high, self.before.low)
        return Spread(middle, low, high, min(self.before.count, self.after.count))

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the ranges of the repeats are apart, ``noise`` where they are not.

        ``same`` where all figures are equal, ``one run`` where there is no spread to judge by, ``-`` without a figure.
        """
        if math.isnan(self.before.median) or math.isnan(self.after.median):
            return "-"
        if self.before == self.after:
            return "same"
        if self.before.count < 2 or self.after.count < 2:
            return "one run"
        if self.before.overlaps(self.after):
            return "noise"
        return _APART[(self.after.median > self.before.median) != self.more_is_better]

    @property
    def is_beyond_the_spread(self) -> bool:
        return self.verdict in _APART


@final
@dataclass(frozen=True)
class MethodChange:
    """A method that both folders have, with one number of training processes."""

    label: str
    before: Group
    after: Group

    @cached_property
    def throughput(self) -> Change:
        return Change("throughput (img/s)", self.before.throughput, self.after.throughput, more_is_better=True)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        before, after = self.before, self.after
        return (
            self.throughput,
            Change("step (ms)", before.comm("step_ms"), after.comm("step_ms"), more_is_better=False),
            Change("exposed (ms)", before.comm("exposed_ms"), after.comm("exposed_ms"), more_is_better=False),
            Change("best accuracy (%)", before.best_accuracy, after.best_accuracy, more_is_better=True),
        )

    def lost_more_than(self, limit: float) -> bool:
        """Throughput fell below `limit` times what it was, or is not known any more."""
        return self.had_throughput and not self.throughput.ratio.median >= limit

    @property
    def had_throughput(self) -> bool:
        return self.before.throughput.median > 0


@final
@dataclass(frozen=True)
class BeforeAfter:
    """Two comparisons, matched by method and number of training processes."""

    before: Comparison
    after: Comparison

    @cached_property
    def methods(self) -> tuple[MethodChange, ...]:
        """In the order in which reports show them."""
        old = {_key(group): group for group in self.before.groups}
        return tuple(
            MethodChange(self._label(group), old[_key(group)], group)
            for group in self.after.groups
            if _key(group) in old
        )

    def only_in(self, one: Comparison) -> list[str]:
        """Methods that the other folder lacks."""
        other = self.after if one is self.before else self.before
        keys = {_key(group) for group in other.groups}
        return [self._label(group) for group in one.groups if _key(group) not in keys]

    @property
    def can_be_judged(self) -> bool:
        """Some method of both folders had a throughput before."""
        return any(method.had_throughput for method in self.methods)

    def losers(self, limit: float) -> list[MethodChange]:
        return [method for method in self.methods if method.lost_more_than(limit)]

    def _label(self, group: Group) -> str:
        counts = {*self.before.process_counts, *self.after.process_counts}
        size = f" on {plural(group.training_processes, 'process', 'es')}" if len(counts) > 1 else ""
        return group.method + size


def _key(group: Group) -> tuple[str, int]:
    return group.method, group.training_processes
