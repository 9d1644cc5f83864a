"""One table of all runs of a comparison, which fills while they go on: what a terminal shows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_STEP = re.compile(r"^epoch (\d+) step (\d+)/(\d+)")
_DONE = re.compile(r"^epoch (\d+)(?:/\d+)? done")
_LOSS = re.compile(r"(?:train )?loss ([\d.e+-]+)")
_TOP1 = re.compile(r"val .*?top-1 ([\d.]+) %")
_IMAGES = re.compile(r"\| ([\d.]+) img/s")
_EXPOSED = re.compile(r"\| step ([\d.]+) ms = .*exposed comm ([\d.]+)")

_BAR_WIDTH, _NARROW, _WIDE = 12, 72, 96
"""Columns of a terminal from which on the loss, and the bar, have room."""


@final
@dataclass
class RunState:
    """What is known of one run so far.

    Attributes:
        state: ``waiting``, ``running``, ``done`` or ``FAILED``.
        epochs_done: With the part of the one under way.
        share: Of a step that is exposed communication, in percent, lately.
        top1: Of the last validation, in percent.
    """

    name: str
    epochs: int
    state: str = "waiting"
    epochs_done: float = 0.0
    started: float = 0.0
    seconds: float = 0.0
    images_per_s: str = ""
    share: str = ""
    loss: str = ""
    top1: str = ""

    def read(self, line: str) -> None:
        """Take in one line that the run has printed."""
        if step := _STEP.match(line):
            epoch, at, steps = map(int, step.groups())
            self.epochs_done = epoch - 1 + at / steps
        elif done := _DONE.match(line):
            self.epochs_done = float(done.group(1))
        else:
            return
        self.images_per_s = _first(_IMAGES, line) or self.images_per_s
        self.loss = _first(_LOSS, line) or self.loss
        self.top1 = _first(_TOP1, line) or self.top1
        if (parts := _EXPOSED.search(line)) and float(parts.group(1)):
            self.share = f"{100 * float(parts.group(2)) / float(parts.group(1)):.0f}"

    @property
    def part_done(self) -> float:
        """From 0 to 1."""
        return 1.0 if self.state in ("done", "FAILED") else min(1.0, self.epochs_done / self.epochs)


def _first(pattern: re.Pattern[str], line: str) -> str | None:
    found = pattern.search(line)
    return found.group(1) if found else None


@final
class ComparisonTable:
    """Runs in order, one at a time. Renders itself, for ``rich.live.Live``, as wide as there is room."""

    def __init__(self, names_and_epochs: Iterable[tuple[str, int]]) -> None:
        self.runs: Sequence[RunState] = [RunState(name, epochs) for name, epochs in names_and_epochs]
        self._began = time.monotonic()

    def start(self, number: int) -> None:
        run = self.runs[number]
        run.state, run.started = "running", time.monotonic()

    def end(self, number: int, failed: bool) -> None:
        run = self.runs[number]
        run.state, run.seconds = "FAILED" if failed else "done", time.monotonic() - run.started

    def read(self, number: int, line: str) -> None:
        self.runs[number].read(line)

    @property
    def part_done(self) -> float:
        """Of the whole comparison, from 0 to 1."""
        return sum(run.part_done for run in self.runs) / len(self.runs)

    def left(self) -> str:
        """How long the rest will take, if it goes on as so far; empty while nobody can tell."""
        done = self.part_done
        if not 0 < done < 1:
            return ""
        return f"about {_duration((time.monotonic() - self._began) / done * (1 - done))} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        width = options.max_width
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("run", overflow="fold", min_width=12)
        table.add_column("progress", no_wrap=True)
        for heading in ("img/s", "exposed", *(("loss",) if width >= _NARROW else ()), "top-1", "time"):
            table.add_column(heading, justify="right", no_wrap=True)
        for run in self.runs:
            table.add_row(*self._cells(run, width))
        done = len([run for run in self.runs if run.state in ("done", "FAILED")])
        summary = f"{done} of {len(self.runs)} runs, {self.part_done:.0%}"
        yield Group(table, Text(", ".join(part for part in (summary, self.left()) if part)))

    def _cells(self, run: RunState, width: int) -> list[RenderableType]:
        seconds = time.monotonic() - run.started if run.state == "running" else run.seconds
        return [
            Text(run.name),
            _progress(run, width >= _WIDE),
            run.images_per_s,
            f"{run.share} %" if run.share else "",
            *([run.loss] if width >= _NARROW else []),
            f"{run.top1} %" if run.top1 else "",
            _duration(seconds) if run.started else "",
        ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _progress(run: RunState, with_bar: bool) -> RenderableType:
    if run.state != "running":
        return Text(run.state, style={"waiting": "dim", "FAILED": "bold red", "done": "green"}[run.state])
    epoch = min(run.epochs, int(run.epochs_done) + 1)
    text = Text(f"epoch {epoch}/{run.epochs} {run.part_done:4.0%}")
    if not with_bar:
        return text
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=run.part_done, width=_BAR_WIDTH), text)
    return row
