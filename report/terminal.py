"""Lines for the terminal: uncut and unwrapped, since paths and commands are there to be copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_MOST_LINES = 12


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print `line` as it is, whatever brackets are in it."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def say_some(console: Console, lines: Sequence[str], style: str | None = None, *, rest: str = "more") -> None:
    """Print the first lines, and how many others (`rest` says what and where) there are."""
    for line in lines[:_MOST_LINES]:
        say(console, line, style)
    if len(lines) > _MOST_LINES:
        say(console, f"and {len(lines) - _MOST_LINES} {rest}", style)
