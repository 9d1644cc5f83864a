"""The sections of a report, computed once and written twice: as plain text and as a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from .caveats import warning_lines
from .circumstances import environment_lines
from .communication import communication_lines
from .comparison import Comparison, plural
from .convergence import convergence_lines
from .fields import UnusableError, printable, read_json_object
from .methods import COMPARISON_FILENAME
from .summary import summary_lines
from .tables import Table, communication_table, throughput_table
from .throughput import scaling_lines, throughput_lines

NO_BREAK = "\N{NO-BREAK SPACE}"


@final
@dataclass(frozen=True)
class Section:
    """Sentences, and what belongs to them: names of plots, commands to copy."""

    title: str
    lines: Sequence[str]
    plots: Sequence[str] = ()
    commands: Sequence[str] = ()


@final
@dataclass(frozen=True)
class Document:
    """A report without a form."""

    title: str
    read: str
    """What it was made from, and how many warnings there are."""
    summary: Section
    tables: tuple[Table, ...]
    sections: tuple[Section, ...]


def glued(line: str) -> str:
    """`line` with blanks that do not break before "%" and within ranges."""
    return line.replace(" %", f"{NO_BREAK}%").replace(" .. ", f"{NO_BREAK}..{NO_BREAK}")


def document_of(comparison: Comparison) -> Document:
    """The whole report; the same files give the same one."""
    warnings = warning_lines(comparison)
    methods = list(dict.fromkeys(group.method for group in comparison.groups))
    files = ", ".join(result.filename for result in comparison.results)
    sections = (
        Section("Throughput", throughput_lines(comparison), ["throughput_comparison", "training_time_comparison"]),
        Section("Convergence", convergence_lines(comparison), ["loss_curves", "accuracy_curves"]),
        Section("Communication", communication_lines(comparison), ["communication_overhead"]),
        Section("Scaling", scaling_lines(comparison)),
        Section("Environment", environment_lines(comparison)),
        Section("Warnings", warnings or [_nothing_wrong(comparison)]),
        _again(comparison),
    )
    return Document(
        title=f"Comparison of {plural(len(methods), 'method')} in {printable(str(comparison.folder))}",
        read=f"Read: {files}. {plural(len(warnings), 'warning')}, at the end.",
        summary=Section("In short", summary_lines(comparison)),
        tables=(throughput_table(comparison), communication_table(comparison)),
        sections=sections,
    )


def _nothing_wrong(comparison: Comparison) -> str:
    files = plural(len(comparison.results), "file")
    return f"None: {files} read, every run complete, with equal batch, data, settings and environment."


def _again(comparison: Comparison) -> Section:
    """The commands that make the comparison and this report again."""
    report = f"gradsync report {shlex.quote(printable(str(comparison.folder)))}"
    try:
        command = read_json_object(comparison.folder / COMPARISON_FILENAME).get("command")
    except UnusableError as error:
        command, reason = None, f"{COMPARISON_FILENAME}: {error}"
    else:
        reason = f"{COMPARISON_FILENAME} names no command"
    if not isinstance(command, str) or not command.strip():
        return Section("Again", [f"How the comparison was started is not known ({reason}). This report:"], (), [report])
    lines = ["The first command made the comparison, the second one makes this report."]
    if "--output" in command:
        lines.append("The first one will not write over results: give it another --output.")
    return Section("Again", lines, (), [printable(command), report])
