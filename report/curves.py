"""Curves of one value per step or epoch, NaN where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, zip_longest

from .figures import NAN, Spread

_WINDOWS_PER_CURVE = 25


def window_of(steps: int) -> int:
    """Width in steps of the running mean that suits a curve of `steps` steps; always odd, 1 for short curves."""
    return steps // _WINDOWS_PER_CURVE // 2 * 2 + 1


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` (odd) values around each, as far as there are any at both ends.

    NaN values stay NaN and do not enter the means around them. So the last value is the mean of the last
    ``window // 2 + 1`` values: what reports call the final loss.
    """
    there = [not math.isnan(value) for value in values]
    sums = [0.0, *accumulate(value if ok else 0.0 for value, ok in zip(values, there, strict=True))]
    counts = [0, *accumulate(there)]
    smooth = []
    for index, ok in enumerate(there):
        low, high = max(0, index - window // 2), min(len(values), index + window // 2 + 1)
        smooth.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if ok else NAN)
    return smooth


def pointwise_median(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median of all curves at each position, over those that reach it."""
    return [Spread.of(values).median for values in zip_longest(*curves, fillvalue=NAN)]


def finite_values(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]
