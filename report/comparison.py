"""The runs of one folder, put side by side: repeats form groups, groups have a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

from .figures import Spread, ratio
from .methods import BASELINE, Style, order_of, style_of
from .results import LoadedResults, Result


@final
@dataclass(frozen=True, eq=False)
class Group:
    """The repeats of one method with one number of training processes."""

    results: tuple[Result, ...]
    variant_number: int = 0
    """Counts the variants in the folder, of all strategies; 0 for a strategy as is."""

    @property
    def strategy(self) -> str:
        return self.results[0].strategy

    @property
    def variant(self) -> str:
        return self.results[0].variant

    @property
    def style(self) -> Style:
        return style_of(self.strategy, self.variant_number)

    @property
    def method(self) -> str:
        return self.results[0].method

    @property
    def training_processes(self) -> int:
        return self.results[0].training_processes

    @property
    def server_processes(self) -> int:
        return self.results[0].server_processes

    @property
    def processes(self) -> str:
        """Such as ``2 + 1 server``."""
        extra = self.server_processes
        return f"{self.training_processes}" + (f" + {extra} server{'s' if extra > 1 else ''}" if extra else "")

    @property
    def repeats(self) -> int:
        return len(self.results)

    def spread(self, read: Callable[[Result], float]) -> Spread:
        """What `read` takes from each run, over all repeats."""
        return Spread.of(read(result) for result in self.results)

    @cached_property
    def throughput(self) -> Spread:
        """Images/s over all training processes."""
        return self.spread(lambda result: result.avg_train_throughput)

    @cached_property
    def epoch_s(self) -> Spread:
        return self.spread(lambda result: result.avg_train_time_per_epoch)

    @cached_property
    def best_accuracy(self) -> Spread:
        """Percent."""
        return self.spread(lambda result: result.best_val_accuracy)

    def comm(self, name: str) -> Spread:
        """The field `name` of :class:`~gradsync.report.results.Communication`."""
        return self.spread(lambda result: getattr(result.comm, name))

    @property
    def total_is_upper_bound(self) -> bool:
        return any(result.comm.total_is_upper_bound for result in self.results)

    @property
    def has_server_traffic(self) -> bool:
        return any(result.comm.has_server for result in self.results)


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """All groups of a folder, the baseline first."""

    folder: Path
    groups: tuple[Group, ...]
    problems: tuple[str, ...] = ()

    @staticmethod
    def of(folder: Path, loaded: LoadedResults) -> Comparison:
        return Comparison(folder, tuple(group_results(loaded.results)), tuple(loaded.problems))

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]

    @property
    def process_counts(self) -> list[int]:
        return sorted({group.training_processes for group in self.groups})

    @property
    def is_sweep(self) -> bool:
        """Some method ran with several numbers of training processes."""
        return any(len(self.sizes_of(group.method)) > 1 for group in self.groups)

    @property
    def has_repeats(self) -> bool:
        return any(group.repeats > 1 for group in self.groups)

    def sizes_of(self, method: str) -> list[Group]:
        """The groups of `method`, fewest training processes first."""
        return [group for group in self.groups if group.method == method]

    def label(self, group: Group) -> str:
        """The method, and the number of training processes where that is not the same for all."""
        several = len(self.process_counts) > 1
        return f"{group.method} on {plural(group.training_processes, 'process', 'es')}" if several else group.method

    def baseline_of(self, group: Group) -> Group | None:
        """Baseline DDP with as many training processes. Without a sweep, whatever number it ran with."""
        baselines = [other for other in self.groups if other.strategy == BASELINE and not other.variant]
        for other in baselines:
            if other.training_processes == group.training_processes:
                return other
        return baselines[0] if len(baselines) == 1 and not self.is_sweep else None

    def has_other_baseline(self, group: Group) -> bool:
        """There is a baseline, and `group` is not it."""
        baseline = self.baseline_of(group)
        return baseline is not None and baseline is not group

    def by_size(self) -> list[list[Group]]:
        """The groups that compare with each other: in a sweep those with as many training processes, else all."""
        if not self.is_sweep:
            return [list(self.groups)]
        sizes = self.process_counts
        return [[group for group in self.groups if group.training_processes == size] for size in sizes]

    def speed_up(self, group: Group) -> Spread:
        """Throughput in terms of the baseline's: ratio of medians, and the range of ratios over the repeats."""
        baseline = self.baseline_of(group)
        if baseline is None or not baseline.throughput.median > 0:
            return Spread()
        if baseline is group:
            return Spread(1.0, 1.0, 1.0, 1)
        ours = {result.repeat: result.avg_train_throughput for result in group.results}
        theirs = {result.repeat: result.avg_train_throughput for result in baseline.results}
        if ours.keys() == theirs.keys() and len(ours) == group.repeats and len(theirs) == baseline.repeats:
            # Repeats are interleaved, so what disturbs one round disturbs both runs in it.
            paired = Spread.of(ratio(ours[repeat], theirs[repeat]) for repeat in ours)
        else:
            low = ratio(group.throughput.low, baseline.throughput.high)
            high = ratio(group.throughput.high, baseline.throughput.low)
            paired = Spread(low=low, high=high, count=max(group.throughput.count, baseline.throughput.count))
        middle = ratio(group.throughput.median, baseline.throughput.median)
        return Spread(middle, paired.low, paired.high, paired.count)


def group_results(results: Sequence[Result]) -> list[Group]:
    """Repeats of one method and process count together, in the order in which reports show them.

    Variants of a strategy are methods of their own, told apart by their names.
    """
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in sorted(results, key=lambda result: (result.repeat, result.filename)):
        groups.setdefault((result.method, result.training_processes), []).append(result)
    variants = sorted({(result.method, result.variant) for result in results if result.variant})
    numbers = {method: number for number, (method, _) in enumerate(variants, start=1)}
    found = [Group(tuple(members), numbers.get(method, 0)) for (method, _), members in groups.items()]
    return sorted(found, key=lambda g: (order_of(g.strategy), g.method, g.training_processes))


def plural(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else ending}"
