"""Result files of a comparison -> tables, plots, a text report and a page.

Needs files only: neither torch nor Lightning.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from ..errors import UserError
from .caveats import warning_lines
from .comparison import Comparison
from .document import Document, document_of
from .files import atomic_write_json, atomic_write_text
from .html import write_html
from .methods import FAILED_PATTERN, RESULT_PATTERN, failed_filename, method_of, result_filename, result_stem
from .plots import draw_plots, write_plots
from .results import RESULT_SCHEMA, LoadedResults, load_results
from .svg import inline_svg
from .terminal import say, say_some
from .text import write_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "RESULT_SCHEMA",
    "Comparison",
    "LoadedResults",
    "ReportPaths",
    "atomic_write_json",
    "atomic_write_text",
    "failed_filename",
    "load_results",
    "make_report",
    "method_of",
    "result_filename",
    "result_stem",
]


@final
@dataclass(frozen=True)
class ReportPaths:
    """What :func:`make_report` has written, with paths as relative as the folder's was."""

    text: Path
    page: Path
    plots: tuple[Path, ...]


def make_report(folder: Path, console: Console | None = None) -> ReportPaths:
    """Report on the ``results_*.json`` in `folder`: print both tables, write text, plots and page beside the results.

    Ends with the paths of all of them and the next command to type. Broken or missing results are named, and the
    report is made from the rest. Where matplotlib is missing, text and page are there, the page without pictures.
    Raises: UserError if there is no usable result, the folder cannot be read or written, or matplotlib is missing.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    folder = Path(folder)
    try:
        comparison = load_comparison(folder)
        document = document_of(comparison)
        for table in document.tables:
            console.print(table.as_rich())
            console.print()
        _print_warnings(comparison, console)
        paths = _write(comparison, document)
    except OSError as error:
        where = error.filename or "standard output"
        raise UserError(f"The report on {folder} cannot be written: {error.strerror} ({where})") from error
    say(console, "Written:", style="bold")
    for path in (paths.text, paths.page, *paths.plots):
        say(console, f"  {path}")
    _print_next_step(folder, console)
    return paths


def _write(comparison: Comparison, document: Document) -> ReportPaths:
    text = write_text(comparison.folder, document)
    try:
        figures = draw_plots(comparison)
    except UserError:  # without matplotlib; all else is of use
        write_html(comparison.folder, document, None)
        raise
    plots = write_plots(comparison, figures)
    pictures = {name: inline_svg(figure, name) for name, figure in figures.items()}
    return ReportPaths(text, write_html(comparison.folder, document, pictures), plots)


def load_comparison(folder: Path) -> Comparison:
    """The results in `folder`. Raises: UserError if there is no usable one; OSError."""
    wanted = f"looked for {RESULT_PATTERN}, which `gradsync compare --output DIR` writes"
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} ({wanted} into DIR).")
    loaded = load_results(folder)
    if not loaded.results:
        has_files = any(any(folder.glob(pattern)) for pattern in (RESULT_PATTERN, FAILED_PATTERN))
        what = f"no usable result in {folder}" if has_files else f"no result in {folder}"
        causes = "".join(f"\n  {problem}" for problem in loaded.problems) if has_files else ""
        raise UserError(f"There is {what} ({wanted}).{causes}")
    return Comparison.of(folder, loaded)


def _print_warnings(comparison: Comparison, console: Console) -> None:
    warnings = [f"Warning: {line}" for line in warning_lines(comparison)]
    say_some(console, warnings, "yellow", rest="more warnings, in the text report")
    if warnings:
        console.print()


def _print_next_step(folder: Path, console: Console) -> None:
    logs = folder / "tensorboard"
    if logs.is_dir():
        say(console, "Next, to look closer:", style="bold")
        say(console, f"  tensorboard --logdir {shlex.quote(str(logs))}")
        say(console, "  and open http://localhost:6006/#custom_scalars")
    else:
        say(console, f"No TensorBoard logs in {logs}: nothing to look closer at than these files.")
