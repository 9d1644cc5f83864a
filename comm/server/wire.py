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
from .layout import flat_alias

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_buffers(specs: Iterable[BufferSpec]) -> list[Tensor]:
    """Buffers in this process's own memory, zeros at first."""
    return [torch.zeros(spec.numel, dtype=spec.dtype, device=spec.device) for spec in specs]


def round_in_place(buckets: Iterable[Bucket], specs: Iterable[BufferSpec]) -> None:
    """Give the parameters of ``buckets`` the values that they would have if they had travelled."""
    for bucket, spec in zip(buckets, specs, strict=True):
        for parameter in bucket.parameters():
            if parameter.dtype != spec.dtype:
                parameter.data.copy_(parameter.data.to(spec.dtype))


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


def refuse_overflow(
    rounded: Iterable[Tensor], exact: Iterable[Tensor | None], parameters: Iterable[Tensor], names: Mapping[Any, str]
) -> None:
    """Raise ValueError, naming the parameter, if rounding made an infinity of a number.

    Infinities and NaN that were there before pass: they would without rounding, too.

    Args:
        rounded: Per parameter, what travels of it, or of its gradient.
        exact: What that was before; None for zeros.
        names: Of the parameters.
    """
    for narrow, wide, parameter in zip(rounded, exact, parameters, strict=True):
        if wide is None or _largest(narrow).isfinite() or not (wide.isfinite() & ~narrow.isfinite()).any():
            continue
        largest = wide[wide.isfinite()].abs().max().item()
        raise ValueError(
            f"parameter {names[parameter]!r}: {largest:.3g}, in it or in its gradient, is too large for "
            f"--trainer.strategy.wire_dtype {_name(narrow)}: use bfloat16, or clip or scale the loss"
        )


def warn_of_underflow(
    rounded: Iterable[Tensor], exact: Iterable[Tensor | None], parameters: Iterable[Tensor], names: Mapping[Any, str]
) -> bool:
    """Warn if rounding left nothing of a whole gradient; returns whether it did. Arguments as above."""
    for narrow, wide, parameter in zip(rounded, exact, parameters, strict=True):
        if wide is not None and _largest(narrow) == 0 and wide.any():
            warnings.warn(
                f"all of the gradient of parameter {names[parameter]!r} is too small for --trainer.strategy.wire_dtype "
                f"{_name(narrow)} and became zero: use bfloat16, or scale the loss",
                stacklevel=2,
            )
            return True
    return False


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude; infinite or NaN if any element is. One pass, without a copy."""
    return torch.linalg.vector_norm(tensor, torch.inf)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
