"""Which bytes travel in which message: derived from the parameters alone, so both sides agree without talking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from ..buckets import BYTES_PER_MIB, Bucket, BufferSpec, bounded_layout, is_dense, make_buckets


@final
class Layout:
    """The trainable parameters of one optimizer, cut into buckets of at most ``part_mib`` MiB.

    A bucket is stepped as a whole. A tensor larger than a part has a bucket of its own and travels in several
    parts, unless its memory has gaps; a bucket of several tensors is always one part.

    Args:
        allocate: Makes the buckets' memory; by default it is this process's own, in the parameters' dtype.
        wire_dtype: In which wider floats travel; None: as they are held.

    Attributes:
        specs: Per bucket, what travels of it.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        # The last layer's gradients come first out of the backward pass, and DDP's order is the same.
        self._part_bytes = int(part_mib * BYTES_PER_MIB)
        self._wire_dtype = wire_dtype
        self.specs: list[BufferSpec] = []
        self.buckets: list[Bucket] = []
        self.extend(parameters, allocate)

    def extend(
        self, parameters: list[Tensor], allocate: Callable[[list[BufferSpec]], list[Tensor]] | None = None
    ) -> list[Bucket]:
        """Append buckets for the trainable ones of ``parameters``, and return them; the others stay as they are."""
        trainable = [p for p in reversed(parameters) if p.requires_grad]
        runs = bounded_layout(trainable, self._part_bytes)
        held = [BufferSpec.of(run) for run in runs]
        specs = [replace(spec, dtype=travelling_dtype(spec.dtype, self._wire_dtype)) for spec in held]
        new = make_buckets(runs, allocate(specs) if allocate else None, first=len(self.buckets))
        self.specs += specs
        self.buckets += new
        return new

    def is_narrowed(self, bucket: Bucket) -> bool:
        """Whether the bucket travels in a narrower dtype than its parameters have."""
        return self.specs[bucket.index()].dtype != bucket.parameters()[0].dtype

    def parts(self, bucket: Bucket) -> list[tuple[int, int]]:
        """Element ranges ``[start, end)`` of the bucket's parts."""
        numel = bucket.buffer().numel()
        step = max(1, self._part_bytes // bucket.parameters()[0].element_size())
        if len(bucket.parameters()) > 1 or not is_dense(bucket.parameters()[0]):
            step = numel
        return [(start, min(start + step, numel)) for start in range(0, numel, max(1, step))]

    def all_parts(self) -> Iterator[tuple[Bucket, int, int, int]]:
        """``(bucket, part index, start, end)`` in the order in which they travel."""
        for bucket in self.buckets:
            for part, (start, end) in enumerate(self.parts(bucket)):
                yield bucket, part, start, end


def travelling_dtype(held: torch.dtype, wire_dtype: torch.dtype | None) -> torch.dtype:
    """In which tensors of dtype ``held`` travel: only float32 and float64 are ever narrowed."""
    return held if wire_dtype is None or held not in (torch.float32, torch.float64) else wire_dtype


def flat_alias(tensor: Tensor, like: Tensor) -> Tensor | None:
    """``tensor``'s memory as 1-D in ``like``'s storage order, None where that needs a copy."""
    if is_dense(like) and tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor.detach().as_strided((tensor.numel(),), (1,))
    return None
