"""``gradsync report DIR`` and ``gradsync report BEFORE AFTER``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from ..errors import UserError
from . import load_comparison, make_report
from .before_after import BeforeAfter
from .change_report import check, print_changes


def main(arguments: list[str]) -> None:
    """Report on one folder, or compare two.

    Exit codes of a comparison of two: 0; 1 if --fail-below finds a loss; 2 if there is nothing to compare.
    Raises: UserError (code 1).
    """
    _let_print_anything()
    parser = _parser()
    options = parser.parse_args(arguments)
    folders: list[Path] = options.folders
    if len(folders) > 2:
        parser.error(f"give one DIR, or two to compare, got {len(folders)}")
    if len(folders) == 1:
        if options.fail_below is not None:
            parser.error("--fail-below compares two folders, got one: gradsync report BEFORE AFTER --fail-below 0.95")
        make_report(folders[0])
        return
    _compare(folders[0], folders[1], options.fail_below)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync report",
        description="Make tables, plots, a text report and an HTML page from the results_*.json of a folder; or, with "
        "two folders, print what changed from the first to the second.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="what `gradsync compare --output DIR` wrote")
    add(
        "--fail-below",
        type=_share,
        metavar="R",
        help="with two folders: exit with code 1 if a method's throughput is below R times what it was, e.g. 0.95",
    )
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, such as 0.95, got {text!r}")
    return share


def _compare(before: Path, after: Path, fail_below: float | None) -> None:
    from rich.console import Console

    console = Console()
    try:
        folders = BeforeAfter(load_comparison(before), load_comparison(after))
    except UserError as error:
        _leave_without_answer(str(error))
    except OSError as error:
        _leave_without_answer(f"{error.filename} cannot be read: {error.strerror}")
    try:
        print_changes(folders, console)
        sys.stdout.flush()  # errors must come after the table where both go into one log
    except OSError as error:
        _leave_without_answer(f"standard output cannot be written: {error.strerror}")
    if fail_below is not None:
        if not folders.can_be_judged:
            _leave_without_answer("--fail-below: no method has a throughput in both folders, so nothing was checked")
        check(folders, fail_below, console)


def _leave_without_answer(reason: str) -> NoReturn:
    """Not code 1, which says that something became slower."""
    with contextlib.suppress(OSError):  # that may be the reason
        sys.stdout.flush()
    print(f"gradsync: error: {reason}", file=sys.stderr)
    sys.exit(2)


def _let_print_anything() -> None:
    """A name that the terminal's encoding lacks shows with question marks; it must not end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
