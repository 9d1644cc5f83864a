"""Figures that may not be there (NaN), their spread over repeats, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import final

NAN = math.nan


@final
@dataclass(frozen=True)
class Spread:
    """A figure over repeated runs: median, smallest and largest. All NaN, and `count` 0, where no run has it."""

    median: float = NAN
    low: float = NAN
    high: float = NAN
    count: int = 0

    @staticmethod
    def of(numbers: Iterable[float]) -> Spread:
        there = [number for number in numbers if not math.isnan(number)]
        return Spread(median(there), min(there), max(there), len(there)) if there else Spread()

    @property
    def relative(self) -> float:
        """Width of the range in terms of the median; NaN with fewer than two runs."""
        return ratio(self.high - self.low, self.median) if self.count > 1 else NAN

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


def first(*numbers: float) -> float:
    """The first that is there."""
    return next((number for number in numbers if not math.isnan(number)), NAN)


def mean(numbers: Iterable[float]) -> float:
    there = [number for number in numbers if not math.isnan(number)]
    return sum(there) / len(there) if there else NAN


def largest(numbers: Iterable[float]) -> float:
    return max((number for number in numbers if not math.isnan(number)), default=NAN)


def ratio(numerator: float, denominator: float) -> float:
    """NaN instead of a division by nothing."""
    return numerator / denominator if denominator > 0 else NAN


def shown_loss(number: float) -> str:
    """Losses are compared with each other to the last digit that matters."""
    return "-" if math.isnan(number) else f"{number:,.4f}" if abs(number) >= 1e-3 or number == 0 else f"{number:.3g}"


def shown_count(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:,.0f}"


def shown(number: float, unit: str = "") -> str:
    """At least three significant digits and never a fraction from 1000 on; "-" where there is no figure."""
    if math.isnan(number):
        return "-"
    size = abs(number)
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.1 else None
    text = f"{number:.3g}" if digits is None else f"{number:,.{digits}f}"
    return f"{text} {unit}" if unit else text


def ranged(spread: Spread, unit: str, digits: int | None = None) -> str:
    """The median, and behind it the range where there are repeats: ``20.0 ms (18.0 .. 22.0)``."""

    def text(number: float) -> str:
        return shown(number) if digits is None else f"{number:.{digits}f}"

    return f"{text(spread.median)} {unit}" + (
        f" ({text(spread.low)} .. {text(spread.high)})" if spread.count > 1 else ""
    )
