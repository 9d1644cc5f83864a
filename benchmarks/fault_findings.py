"""What a trial of `faults.py` has found, and how trials of one row become a cell of its table."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from busy import ALLOWED_WHEN_BUSY
from fault_columns import Column, Job
from fault_process import Ending, Run

STEP_TIMEOUT_S = 10.0
"""Of trials in which a rank waits for one that does not come."""
Fact = bool | int | float | str
_AS_USUAL: dict[str, Fact] = {"orphans": 0, "ended by itself": True}
"""Said only if it was otherwise in a trial."""


class NotRun(Exception):
    """The trial cannot be made here, for the reason in the text."""


@final
@dataclass
class Findings:
    """Facts, by a name that a reader understands, and which of them miss what should be.

    Args:
        case: Stands before its facts, where several cases share a cell.
    """

    case: str = ""
    facts: dict[str, Fact] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def saw(self, name: str, value: Fact) -> None:
        self.facts[name] = value

    def should(self, name: str, value: bool) -> None:
        self.saw(name, value)
        if not value:
            self.misses.append(f"not so: {name}")

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.saw(name, value)
        if value > bound:
            self.misses.append(f"{name}: {value:.3g}, should be at most {bound:g}")

    def quickly(self, name: str, seconds: float, bound_s: float, was_busy: bool) -> None:
        """As `at_most`, three times as long on a busy machine."""
        self.at_most(f"{name}, s", seconds, bound_s * (ALLOWED_WHEN_BUSY if was_busy else 1))

    def ended(self, ending: Ending, bound_s: float | None = None, fails: bool | None = True) -> None:
        """What every trial looks at.

        Args:
            bound_s: From the fault until all are out, where there is such a moment.
            fails: The exit code must not be 0, must be 0, or (None) may be anything.
        """
        self.should("ended by itself", not ending.hung)
        if not ending.hung:
            self.saw("exit code", str(ending.code))
            if bound_s is not None:
                self.quickly("all out", ending.seconds, bound_s, ending.was_busy)
        if fails is not None and (ending.code != 0) != fails:
            self.misses.append(f"exit code {ending.code}")
        self.at_most("orphans", ending.orphans, 0)
        if ending.orphans:
            self.saw("orphans lived, s", ending.orphans_s)

    def left_nothing(self, run: Run) -> None:
        for name, number in run.leftovers().items():
            if number:
                self.at_most(f"left {name}", number, 0)


@final
class Bench:
    """One column, and folders for its trials.

    Args:
        folder: For everything but temporary files.
        temporary: For those; short, and on another file system where there is one.
    """

    def __init__(self, column: Column, folder: Path, temporary: Path) -> None:
        self.column = column
        self._folder, self._temporary, self._number = folder, temporary, 0
        self.log = folder

    def new_folder(self) -> Path:
        """For the next trial; :attr:`log` is where its output goes from now on."""
        self._number += 1
        folder = self._folder / f"{self.column.name}{self._number}"
        folder.mkdir(parents=True)
        self.log = folder / "output.log"
        return folder

    @contextmanager
    def run(
        self,
        job: Job,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        keeps_temporary: bool = False,
    ) -> Iterator[Run]:
        """Start it in a new folder, or go on in one. On leaving the context its temporary files go, too."""
        folder = folder or self.new_folder()
        self.log = folder / "output.log"
        temporary = self.temporary(folder)
        with Run(self.column.command(job), folder, temporary, self.log, environment) as run:
            yield run
        if not keeps_temporary:
            shutil.rmtree(temporary, ignore_errors=True)

    def temporary(self, folder: Path) -> Path:
        """Where a run in `folder` has its temporary files."""
        return self._temporary / folder.name


Trial = Callable[[Bench, str], Findings]


@final
@dataclass(frozen=True)
class Row:
    """A fault.

    Args:
        title: For the table.
        cases: Every trial goes through all of them.
        trial: Makes one, of one case. Raises: NotRun, TrialFailed.
        takes_turns: A trial takes the next case instead.
    """

    title: str
    cases: Sequence[str]
    trial: Trial
    takes_turns: bool = False

    def cases_of(self, number: int) -> Sequence[str]:
        """Of trial `number`, from 0."""
        return [self.cases[number % len(self.cases)]] if self.takes_turns else self.cases


def cell(trials: Sequence[Findings]) -> str:
    """All of a row in one line: how often something was so, medians (and ranges) of figures; case by case."""
    parts = []
    for case in dict.fromkeys(found.case for found in trials):
        facts = [found.facts for found in trials if found.case == case]
        values = {name: [f[name] for f in facts if name in f] for name in dict.fromkeys(n for f in facts for n in f)}
        unusual = {name: found for name, found in values.items() if {*found} != {_AS_USUAL.get(name)}}
        texts = [_summary(name, found) for name, found in unusual.items()]
        parts.append((f"*{case}:* " if case else "") + "; ".join(texts))
    return "; ".join(parts)


def _summary(name: str, values: list[Fact]) -> str:
    if all(isinstance(value, bool) for value in values):
        return f"{name}: {_count(values)}"
    if any(isinstance(value, str) for value in values):
        return f"{name} {', '.join(sorted({str(value) for value in values}))}"
    numbers = [float(value) for value in values]
    title, _, unit = name.partition(", ")
    low, high = min(numbers), max(numbers)
    if low != high and all(isinstance(value, int) for value in values):
        return f"{title}: {low:.0f} to {high:.0f}"
    spread = f" ({_number(low)} to {_number(high)})" if _number(low) != _number(high) else ""
    return f"{title}: {_number(statistics.median(numbers))}{spread}{' ' + unit if unit else ''}"


def _count(values: list[Fact]) -> str:
    if len(values) == 1:
        return "yes" if values[0] else "no"
    return f"{sum(bool(value) for value in values)} of {len(values)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}" if value >= 0.1 else f"{value:.1g}"
