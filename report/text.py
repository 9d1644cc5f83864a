"""``performance_report.txt``: the tables, and what they mean in sentences computed from the result files."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .comparison import Comparison
from .document import NO_BREAK, Document, Section, document_of, glued
from .files import atomic_write_text

FILENAME = "performance_report.txt"
_WIDTH = 110


def write_text(folder: Path, document: Document) -> Path:
    """Write the report into `folder` and return its path. Raises: OSError."""
    path = folder / FILENAME
    atomic_write_text(path, as_text(document))
    return path


def report_text(comparison: Comparison) -> str:
    """The whole report; the same files give the same text."""
    return as_text(document_of(comparison))


def as_text(document: Document) -> str:
    head = [document.title, "=" * len(document.title), *textwrap.wrap(document.read, _WIDTH)]
    tables = (table.as_text() for table in document.tables)
    parts = ["\n".join(head), _section(document.summary), *tables, *map(_section, document.sections)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    # Commands stay on one line: they are there to be copied.
    commands = (f"    {command}" for command in section.commands)
    return "\n".join([section.title, "-" * len(section.title), *map(_bullet, section.lines), *commands])


def _bullet(line: str) -> str:
    """Wrapped, but neither between a number and its "%", nor within ranges, names and paths."""
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
    return wrapper.fill(glued(line)).replace(NO_BREAK, " ")
