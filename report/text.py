"""``performance_report.txt``: the tables, and what they mean in sentences computed from the result files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .circumstances import environment_lines, warning_lines
from .communication import communication_lines
from .comparison import Comparison, plural
from .convergence import convergence_lines
from .files import atomic_write_text
from .tables import communication_table, throughput_table
from .throughput import scaling_lines, throughput_lines

FILENAME = "performance_report.txt"
_WIDTH = 110


def write_text(comparison: Comparison) -> Path:
    """Write the report into the comparison's folder and return its path."""
    path = comparison.folder / FILENAME
    atomic_write_text(path, report_text(comparison))
    return path


def report_text(comparison: Comparison) -> str:
    """The whole report; the same files give the same text."""
    warnings = warning_lines(comparison)
    parts = [
        _headline(comparison, len(warnings)),
        throughput_table(comparison).as_text(),
        communication_table(comparison).as_text(),
        _section("Throughput", throughput_lines(comparison)),
        _section("Convergence", convergence_lines(comparison)),
        _section("Communication", communication_lines(comparison)),
        _section("Scaling", scaling_lines(comparison)),
        _section("Environment", environment_lines(comparison)),
        _section("Warnings", warnings or [_nothing_wrong(comparison)]),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(comparison: Comparison, num_warnings: int) -> str:
    methods = list(dict.fromkeys(group.method for group in comparison.groups))
    title = f"Comparison of {plural(len(methods), 'method')} in {comparison.folder}"
    files = ", ".join(result.filename for result in comparison.results)
    read = f"Read: {files}. {plural(num_warnings, 'warning')}, at the end."
    return "\n".join([title, "=" * len(title), *textwrap.wrap(read, _WIDTH)])


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, "-" * len(title), *(_bullet(line) for line in lines)])


def _bullet(line: str) -> str:
    """Wrapped, but neither between a number and its "%" nor within names and paths."""
    glued = line.replace(" %", "\N{NO-BREAK SPACE}%")
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
    return wrapper.fill(glued).replace("\N{NO-BREAK SPACE}", " ")


def _nothing_wrong(comparison: Comparison) -> str:
    files = plural(len(comparison.results), "file")
    return f"None: {files} read, every run complete, with equal batch, data, settings and environment."
