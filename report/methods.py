"""What a strategy is called in results, files and pictures: one place, so that they always agree."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import final

BASELINE = "ddp"
"""The strategy that speed-ups and loss curves are compared with."""

RESULT_PATTERN = "results_*.json"
FAILED_PATTERN = "failed_*.json"

COMPARISON_FILENAME = "comparison.json"
"""What a comparison was asked for: ``{"strategies": [NAME or NAME:VARIANT], "command": text}``."""


@final
@dataclass(frozen=True)
class Method:
    """A strategy as it appears in a comparison."""

    strategy: str
    """Its flag: ``--trainer.strategy STRATEGY``."""
    name: str
    """``method`` in result files, and its label in tables and plots."""
    stem: str
    """``results_<stem>.json``, ``logs/<stem>.log``, ``failed_<stem>.json``, each before suffixes."""
    variant: str = ""
    """What tells it from others of the strategy, such as ``mode=async+transport=tcp``; empty for the strategy as is."""

    @property
    def run_name(self) -> str:
        """For people and folders, before suffixes: ``parameter_server-mode-async``."""
        return self.strategy + _suffix(self.variant)


@final
@dataclass(frozen=True)
class Style:
    """How a strategy is drawn. Every field tells strategies apart without colour, too."""

    color: str
    marker: str
    hatch: str
    dashes: tuple[float, ...]
    """On and off lengths in line widths; empty for a solid line."""


@final
@dataclass(frozen=True)
class StemParts:
    """``ps_w4_r2`` taken apart: base ``ps``, 4 training processes (None without suffix), repeat 2 (1 without)."""

    base: str
    training_processes: int | None
    repeat: int


STANDARD_METHODS = (
    Method("ddp", "Baseline DDP (PyTorch)", "baseline_ddp"),
    Method("manual_allreduce", "Manual All-Reduce", "all_reduce"),
    Method("parameter_server", "Parameter Server (PS)", "ps"),
)

# The palette of Okabe and Ito, which readers with any colour vision can tell apart; yellow is too faint for lines.
_KNOWN_STYLES = {
    "ddp": Style("#0072B2", "o", "", ()),
    "manual_allreduce": Style("#E69F00", "s", "//", (4, 1.5)),
    "parameter_server": Style("#009E73", "^", "..", (1, 1)),
    "sharded_server": Style("#CC79A7", "D", "xx", (5, 1, 1, 1)),
}
_OTHER_COLORS = ("#56B4E9", "#D55E00", "#000000")
_OTHER_MARKERS = ("v", "P", "X", "*", "h")
_OTHER_HATCHES = ("\\\\", "++", "oo", "--", "||")
_OTHER_DASHES = ((6, 1), (3, 1, 1, 1, 1, 1), (2, 2), (8, 2, 2, 2), (1, 2))


def method_of(strategy: str, variant: str = "") -> Method:
    """The method that `strategy` (a flag) stands for; any other strategy is named after itself.

    `variant` becomes part of its name: ``Parameter Server (PS), mode async`` for ``mode=async``.
    """
    plain = _plain_method_of(strategy)
    if not variant:
        return plain
    label = ", ".join(part.replace("=", " ", 1).strip() for part in variant.split("+"))
    return Method(strategy, f"{plain.name}, {label}", plain.stem + _suffix(variant), variant)


def _suffix(variant: str) -> str:
    """Safe in file names, and without the underscores that counts and repeats begin with."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", variant).strip("-.")
    return f"-{words or zlib.crc32(variant.encode('utf-8', 'replace'))}" if variant else ""


def _plain_method_of(strategy: str) -> Method:
    for method in STANDARD_METHODS:
        if method.strategy == strategy:
            return method
    name = strategy.replace("_", " ").strip().title() if re.fullmatch(r"[a-z0-9_]+", strategy) else strategy
    return Method(strategy, name, re.sub(r"[^A-Za-z0-9_-]+", "_", strategy).strip("_") or "unnamed")


def strategy_of(method_name: str, base: str) -> str:
    """The flag behind a result that does not name it, by its ``method`` or else by the base of its file's stem."""
    for method in STANDARD_METHODS:
        if method_name == method.name or base == method.stem:
            return method.strategy
    return base


def style_of(strategy: str, variant_number: int = 0) -> Style:
    """How `strategy` is drawn: always the same, on every machine, for strategies that nobody foresaw as well.

    Its variants are numbered from 1 on within a report; no two of them look the same until there are very many.
    """
    if variant_number:
        index = variant_number - 1
        shape = index % len(_OTHER_MARKERS)
        color = _OTHER_COLORS[index % len(_OTHER_COLORS)]
        return Style(color, _OTHER_MARKERS[shape], _OTHER_HATCHES[shape], _OTHER_DASHES[shape])
    if strategy in _KNOWN_STYLES:
        return _KNOWN_STYLES[strategy]
    number = zlib.crc32(strategy.encode("utf-8", "replace"))
    rest, color = divmod(number, len(_OTHER_COLORS))
    shape = rest % len(_OTHER_MARKERS)
    return Style(_OTHER_COLORS[color], _OTHER_MARKERS[shape], _OTHER_HATCHES[shape], _OTHER_DASHES[shape])


def order_of(strategy: str) -> tuple[int, str]:
    """Sort key: the baseline first, then the other standard methods, then the rest by name."""
    known = [method.strategy for method in STANDARD_METHODS]
    return (known.index(strategy) if strategy in known else len(known), strategy)


def result_stem(strategy: str, variant: str = "", *, training_processes: int | None = None, repeat: int = 1) -> str:
    """Stem of a run's files, such as ``ps_w4_r2``. `training_processes` only where a comparison sweeps over them."""
    return join_stem(StemParts(method_of(strategy, variant).stem, training_processes, repeat))


def join_stem(parts: StemParts) -> str:
    """The inverse of :func:`split_stem`."""
    processes = "" if parts.training_processes is None else f"_w{parts.training_processes}"
    return f"{parts.base}{processes}" + (f"_r{parts.repeat}" if parts.repeat > 1 else "")


def split_stem(stem: str) -> StemParts:
    """Take the stem of a file apart: ``ps_w4_r2``."""
    match = re.fullmatch(r"(.+?)(?:_w(\d+))?(?:_r(\d+))?", stem, re.DOTALL)
    if match is None:
        return StemParts(stem, None, 1)
    base, processes, repeat = match.groups()
    return StemParts(base, int(processes) if processes else None, int(repeat) if repeat else 1)


def result_filename(stem: str) -> str:
    return f"results_{stem}.json"


def failed_filename(stem: str) -> str:
    return f"failed_{stem}.json"
