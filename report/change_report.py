"""What ``gradsync report BEFORE AFTER`` prints: a table of changes, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UserError
from .before_after import BeforeAfter, Change, MethodChange
from .comparison import plural
from .differences import difference_lines
from .tables import Table, cell
from .terminal import say, say_some

if TYPE_CHECKING:
    from rich.console import Console


def change_table(folders: BeforeAfter) -> Table:
    """A row for each method, below it one for each figure."""
    rows: list[tuple[str, ...]] = []
    for method in folders.methods:
        rows.append((method.label, "", "", "", ""))
        rows.extend(_row(change) for change in method.changes)
    notes = (
        "After/before: of the medians; below it the widest range that the repeats allow.",
        "better, worse: the ranges of the repeats are apart. noise: they overlap. one run: there is no range.",
    )
    columns = ("Figure", "Before", "After", "After/before", "Change")
    return Table("Before and after", columns, tuple(rows), notes)


def _row(change: Change) -> tuple[str, ...]:
    factor = cell(change.ratio, suffix="x", digits=3)
    return f"  {change.figure}", cell(change.before), cell(change.after), factor, change.verdict


def change_lines(folders: BeforeAfter) -> list[str]:
    """What is beyond the spread, what cannot be compared, and what else changed."""
    lines = list(_verdicts(folders))
    for which, comparison in (("before", folders.before), ("after", folders.after)):
        lines.extend(f"Only {which} ({comparison.folder}): {name}." for name in folders.only_in(comparison))
    return lines


def _verdicts(folders: BeforeAfter) -> Iterator[str]:
    changes = [(method, change) for method in folders.methods for change in method.changes]
    for method, change in changes:
        if change.is_beyond_the_spread:
            yield f"{method.label}: {change.figure} {change.ratio.median:.3f}x, {change.verdict} beyond the spread."
    judged = [change for _, change in changes if change.ratio.count > 1]
    if judged and not any(change.is_beyond_the_spread for change in judged):
        yield "No change is beyond the spread of the repeats."
    if not judged and changes:
        yield "One run shows no spread: whether a change is more than noise is not known (--repeats 3 tells)."


def print_changes(folders: BeforeAfter, console: Console) -> None:
    """Table, sentences, problems of either folder and other differences between them."""
    if folders.methods:
        console.print(change_table(folders).as_rich())
        console.print()
    else:
        say(console, f"{folders.before.folder} and {folders.after.folder} have no method in common.")
    for line in change_lines(folders):
        say(console, line)
    problems = [
        f"Warning: {which}: {problem}"
        for which, comparison in (("before", folders.before), ("after", folders.after))
        for problem in comparison.problems
    ]
    differences = [f"Also changed: {line}" for line in difference_lines(folders)]
    for lines in (problems, differences):
        say_some(console, lines, style="yellow")


def check(folders: BeforeAfter, fail_below: float, console: Console) -> None:
    """Print that no method lost too much. Raises: UserError that names those that did."""
    judged = [method for method in folders.methods if method.had_throughput]
    losers = folders.losers(fail_below)
    if losers:
        names = "; ".join(map(_loss, losers))
        raise UserError(f"throughput below {fail_below:g} times what it was: {names}")
    least = min(judged, key=lambda method: method.throughput.ratio.median)
    say(
        console,
        f"No throughput is below {fail_below:g} times what it was ({plural(len(judged), 'method')}; "
        f"least: {least.label}, {least.throughput.ratio.median:.3f}x).",
    )


def _loss(method: MethodChange) -> str:
    change = method.throughput
    if math.isnan(change.ratio.median):
        return f"{method.label} (no figure any more)"
    beyond = {"noise": ", within the spread of the repeats", "one run": ", one run"}.get(change.verdict, "")
    return f"{method.label} ({change.ratio.median:.3f}x{beyond})"
