"""The dtype in which gradients and parameters travel, where it is narrower than the one they are held in.

Who sends rounds, and refuses what the narrower dtype cannot hold; who receives widens before it computes. Values to
start from and those that a worker fetches travel as they are held, so nothing that is kept was ever rounded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..buckets import Bucket, BufferSpec, make_buckets
from ..packing import tensor_bytes
from .layout import Layout, flat_alias

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_buffers(specs: Iterable[BufferSpec]) -> list[Tensor]:
    """Buffers in this process's own memory, zeros at first."""
    return [torch.zeros(spec.numel, dtype=spec.dtype, device=spec.device) for spec in specs]


def round_in_place(layout: Layout, names: Mapping[Any, str]) -> None:
    """Give parameters the values that they would have if they had travelled. Raises as :func:`check_parameters`."""
    for bucket in layout.buckets:
        if layout.is_narrowed(bucket):
            parameters = bucket.parameters()
            rounded = [p.detach().to(layout.specs[bucket.index()].dtype) for p in parameters]
            _refuse_overflow(rounded, parameters, parameters, names)
            for parameter, narrow in zip(parameters, rounded, strict=True):
                parameter.data.copy_(narrow)


def exact_bytes(bucket: Bucket, start: int, end: int) -> memoryview:
    """Part ``[start, end)`` of the bucket's parameters as they are held."""
    parameters = bucket.parameters()
    flat = flat_alias(parameters[0], parameters[0]) if len(parameters) == 1 else None
    if flat is None:
        copy = make_buckets([parameters])[0]
        for view, parameter in zip(copy.views, parameters, strict=True):
            view.copy_(parameter.detach())
        flat = copy.buffer()
    return tensor_bytes(flat[start:end].cpu())


def check_parameters(bucket: Bucket, rounded: Tensor, exact: Tensor, names: Mapping[Any, str]) -> None:
    """Raise ValueError, naming the parameter, if rounding made an infinity of a number.

    Infinities and NaN that were there before pass, as they would without rounding.

    Args:
        bucket: Of the parameters.
        rounded: What travels of one part of it, 1-D.
        exact: What that was before.
        names: Of the parameters.
    """
    parameters = bucket.parameters()
    sizes = [p.numel() for p in parameters] if len(parameters) > 1 else [len(exact)]
    _refuse_overflow(rounded.split(sizes), exact.split(sizes), parameters, names)


def check_gradients(
    bucket: Bucket, gradients: list[Tensor | None], start: int, end: int, names: Mapping[Any, str]
) -> str | None:
    """Raise as :func:`check_parameters` for part ``[start, end)`` of the gradients that ``bucket`` now holds, rounded.

    Returns the name of a parameter of whose gradient rounding left nothing, None if there is none.
    """
    parameters, first = bucket.parameters(), gradients[0]
    lone = flat_alias(first, parameters[0]) if first is not None and len(gradients) == 1 else None
    if lone is not None:
        rounded, exact = [bucket.buffer()[start:end]], [lone[start:end]]
    elif start == 0:
        rounded, exact = bucket.views, gradients
    else:
        return None  # all of it was checked with the first part
    _refuse_overflow(rounded, exact, parameters, names)
    vanished = [
        parameter
        for narrow, wide, parameter in zip(rounded, exact, parameters, strict=True)
        if wide is not None and _largest(narrow) == 0 and wide.any()
    ]
    return names[vanished[0]] if vanished else None


def warn_of_underflow(name: str, wire_dtype: torch.dtype | None) -> None:
    warnings.warn(
        f"all of the gradient of parameter {name!r} is too small for --trainer.strategy.wire_dtype "
        f"{_name(wire_dtype)} and became zero: use bfloat16, or scale the loss",
        stacklevel=2,
    )


def _refuse_overflow(
    rounded: Iterable[Tensor], exact: Iterable[Tensor | None], parameters: Iterable[Tensor], names: Mapping[Any, str]
) -> None:
    for narrow, wide, parameter in zip(rounded, exact, parameters, strict=True):
        if wide is None or _largest(narrow).isfinite() or not (wide.isfinite() & ~narrow.isfinite()).any():
            continue
        largest = wide[wide.isfinite()].abs().max().item()
        raise ValueError(
            f"parameter {names[parameter]!r}: {largest:.3g}, in it or in its gradient, is too large for "
            f"--trainer.strategy.wire_dtype {_name(narrow.dtype)}: use bfloat16, or clip or scale the loss"
        )


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude; infinite or NaN if any element is. One pass, without a copy."""
    return torch.linalg.vector_norm(tensor, torch.inf) if tensor.numel() else tensor.new_zeros(())


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
