"""What a comparison folder does not hold, and why: runs that failed, runs that one would expect."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from .fields import Fields, UnusableError, read_json_object
from .methods import COMPARISON_FILENAME, STANDARD_METHODS, StemParts, join_stem, method_of, result_filename, split_stem

_STANDARD_NAMES = {method.stem: method.name for method in STANDARD_METHODS}


def describe_failure(path: Path, with_epochs: Iterable[str]) -> str:
    """One line on the failed run that ``failed_<stem>.json`` at `path` tells of.

    `with_epochs` names the result files that are there: a run may fail after some finished epochs.
    """
    stem = path.stem.removeprefix("failed_")
    rest = "its finished epochs are in this report" if result_filename(stem) in with_epochs else "it has no result"
    try:
        fields = Fields(read_json_object(path), [])
    except UnusableError as error:
        return f"{stem} failed; {rest}. {path.name} does not tell why: {error}"
    method = fields.text("method") or _name(split_stem(stem).base)
    code = fields.number("exit_code", nullable=True)
    exit_code = "" if math.isnan(code) else f" with exit code {code:g}"
    log = fields.text("log")
    where = f" (log: {path.parent / log})" if log else ""
    return f"{method} ({stem}) failed{exit_code}; {rest}. {fields.text('error') or 'No error text'}{where}"


def describe_missing(folder: Path, stems: set[str], failed: set[str]) -> list[str]:
    """One line for each run that one would expect beside those in `stems`.

    Expected is every method that the comparison was asked for (or of the original experiment, where that is not
    known), and every method in each repeat and process count that any other method has. Runs in `failed` are known
    to have no result.
    """
    parts = [split_stem(stem) for stem in sorted(stems)]
    suffixes = {(part.training_processes, part.repeat) for part in parts}
    known = {split_stem(stem).base for stem in stems | failed}
    asked_for = _asked_for(folder)
    lines = []
    for base in dict.fromkeys([*asked_for, *(part.base for part in parts)]):
        if base not in known:
            lines.append(f"{result_filename(base)} is not there: no {asked_for[base]} in this report")
            continue
        wanted = {join_stem(StemParts(base, processes, repeat)) for processes, repeat in suffixes}
        lines.extend(_absent(folder, stem) for stem in sorted(wanted - stems - failed))
    return lines


def _asked_for(folder: Path) -> dict[str, str]:
    """Bases and names of the methods that ``gradsync compare`` was asked for."""
    try:
        strategies = read_json_object(folder / COMPARISON_FILENAME).get("strategies")
    except UnusableError:
        strategies = None
    if not isinstance(strategies, list):
        return _STANDARD_NAMES
    methods = (method_of(*str(strategy).split(":", 1)) for strategy in strategies)
    return {method.stem: method.name for method in methods}


def _absent(folder: Path, stem: str) -> str:
    log = folder / "logs" / f"{stem}.log"
    trace = f"; see {log}" if log.is_file() else ""
    return f"{result_filename(stem)} is not there, although another method has this run{trace}"


def _name(base: str) -> str:
    return _STANDARD_NAMES.get(base) or method_of(base).name
