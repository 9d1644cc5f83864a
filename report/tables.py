"""The two tables of a comparison: one data model, drawn for terminals and written as plain text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, final

from .comparison import Comparison
from .comparison import Group as Runs
from .figures import Spread, shown
from .methods import Style

if TYPE_CHECKING:
    from rich.console import Group

_TEXT_WIDTH = 120
_LONGEST_WHOLE_WORD = 16


@final
@dataclass(frozen=True)
class Table:
    """Cells are final texts; a line break in one separates a median from its range."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    styles: tuple[Style, ...] = ()
    """How the plots draw what is in each row; may be empty."""

    def as_rich(self, *, ascii_only: bool = False) -> Group:
        """For ``rich.console.Console.print``: title, table, notes."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        several_lines = any("\n" in cell for row in self.rows for cell in row)
        look = box.ASCII2 if ascii_only else box.SIMPLE_HEAD
        table = RichTable(box=look, show_lines=ascii_only and several_lines, pad_edge=ascii_only)
        words = (word for row in self.rows for word in row[0].split())
        name_width = min(_LONGEST_WHOLE_WORD, max(map(len, words), default=0))
        # Text objects: a method called "[bold]" is a name and no markup.
        # Folding: in a narrow terminal rich would cut figures off.
        for index, column in enumerate(self.columns):
            if index == 0:
                table.add_column(Text(column), overflow="fold", min_width=name_width)
            else:
                table.add_column(Text(column), overflow="fold", justify="right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return Group(Text(self.title, style="bold"), table, *(Text(note, style="dim") for note in self.notes))

    def as_text(self) -> str:
        """For files: the same cells, plain ASCII rules, no colour, whatever terminal this runs in."""
        from rich.console import Console

        output = StringIO()
        console = Console(file=output, width=_TEXT_WIDTH, color_system=None, legacy_windows=False)
        console.print(self.as_rich(ascii_only=True))
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def throughput_table(comparison: Comparison) -> Table:
    """Table 1: what each method achieved."""
    columns = (
        "Method",
        "Training\nprocesses",
        "Throughput\n(img/s)",
        "Time per\nepoch (s)",
        "Best\naccuracy (%)",
        "Speed-up vs\nBaseline DDP",
    )
    rows = tuple(_throughput_row(comparison, group) for group in comparison.groups)
    notes = [*_repeat_notes(comparison), *_other_baseline_notes(comparison)]
    if any(group.server_processes for group in comparison.groups):
        notes.append("+ 1 server: a process that trains nothing runs beside the training processes.")
    return Table("Throughput and accuracy", columns, rows, tuple(notes), _styles(comparison))


def _throughput_row(comparison: Comparison, group: Runs) -> tuple[str, ...]:
    mark = "*" if _other_baseline(comparison, group) else ""
    return (
        group.method,
        group.processes,
        cell(group.throughput),
        cell(group.epoch_s),
        cell(group.best_accuracy, digits=2),
        cell(comparison.speed_up(group), suffix=f"x{mark}", digits=2),
    )


def communication_table(comparison: Comparison) -> Table:
    """Table 2: what communication cost in an average step on rank 0."""
    columns = (
        "Method",
        "Pull\n(ms)",
        "Push\n(ms)",
        "All-\nreduce\n(ms)",
        "Total\n(ms)",
        "Exposed\n(ms)",
        "Share of\nstep (%)",
    )
    rows = tuple(_communication_row(comparison, group) for group in comparison.groups)
    notes = [
        "Total: communication was under way. Exposed: training waited for it. Share of step: exposed / step.",
        *_repeat_notes(comparison),
    ]
    if any(group.total_is_upper_bound for group in comparison.groups):
        notes.append("<=: upper bound, because gaps or overlaps within the communication are not known.")
    return Table("Communication per step (rank 0)", columns, rows, tuple(notes), _styles(comparison))


def _styles(comparison: Comparison) -> tuple[Style, ...]:
    return tuple(group.style for group in comparison.groups)


def _communication_row(comparison: Comparison, group: Runs) -> tuple[str, ...]:
    prefix = "<=" if group.total_is_upper_bound else ""
    total = cell(group.comm("total_ms"), prefix=prefix)
    return (
        comparison.label(group),
        cell(group.comm("pull_ms")),
        cell(group.comm("push_ms")),
        "-" if group.has_server_traffic else total,
        total,
        cell(group.comm("exposed_ms")),
        cell(group.comm("share_pct"), digits=1),
    )


def cell(spread: Spread, *, prefix: str = "", suffix: str = "", digits: int | None = None) -> str:
    """The median and, on a line of its own, the range over several runs."""

    def text(number: float) -> str:
        return shown(number) if digits is None or math.isnan(number) else f"{number:,.{digits}f}"

    if math.isnan(spread.median):
        return "-"
    median = f"{prefix}{text(spread.median)}{suffix}"
    return f"{median}\n{text(spread.low)} .. {text(spread.high)}" if spread.count > 1 else median


def _repeat_notes(comparison: Comparison) -> list[str]:
    if not comparison.has_repeats:
        return []
    counts = sorted({group.repeats for group in comparison.groups})
    return [f"Median over {' or '.join(map(str, counts))} repeats; below it smallest .. largest."]


def _other_baseline(comparison: Comparison, group: Runs) -> Runs | None:
    baseline = comparison.baseline_of(group)
    return baseline if baseline and baseline.training_processes != group.training_processes else None


def _other_baseline_notes(comparison: Comparison) -> list[str]:
    others = {_other_baseline(comparison, group) for group in comparison.groups} - {None}
    return [
        f"*: Baseline DDP ran with another number of training processes ({other.training_processes})."
        for other in others
        if other
    ]
