"""Mean, spread, extremes and zeros of one tensor, a piece at a time: memory does not grow with the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..comm.buckets import is_dense

_PIECE = 1 << 20
"""Elements at a time, in float64: 8 MiB, twice."""


@final
@dataclass(frozen=True)
class Statistics:
    """Of the finite values; None where there are none.

    Attributes:
        std: Divided by the number of values.
        zeros: Share of all values, 0 to 1.
        num_nonfinite: NaN and infinite values.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    zeros: float | None
    num_nonfinite: int


def statistics_of(tensor: Tensor) -> Statistics:
    """Of a sparse tensor its zeros that are not stored count, too; of a complex one the absolute values."""
    if tensor.layout != torch.strided:
        stored = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
        return _statistics([*_pieces(stored)], tensor.numel() - stored.numel())
    return _statistics(_pieces(tensor), 0)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        yield (piece.abs() if piece.is_complex() else piece).double()


def _statistics(pieces: Iterator[Tensor] | list[Tensor], num_zeros: int) -> Statistics:
    """Means and squares of pieces are merged as Chan, Golub and LeVeque do (1983): no sum of squares cancels."""
    count, mean, squares = num_zeros, 0.0, 0.0
    low, high = (0.0, 0.0) if num_zeros else (math.inf, -math.inf)
    zeros, total = num_zeros, num_zeros
    for piece in pieces:
        total += piece.numel()
        zeros += piece.numel() - int(piece.count_nonzero())
        finite = piece[piece.isfinite()]
        if finite.numel():
            own = float(finite.mean())
            squares += float((finite - own).square_().sum()) + _between(count, finite.numel(), own - mean)
            mean += (own - mean) * finite.numel() / (count + finite.numel())
            count += finite.numel()
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    share = zeros / total if total else None
    if count == 0:
        return Statistics(None, None, None, None, share, total)
    return Statistics(mean, math.sqrt(squares / count), low, high, share, total - count)


def _between(count: int, more: int, distance: float) -> float:
    return distance * distance * count * more / (count + more)
