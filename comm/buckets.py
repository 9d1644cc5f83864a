"""Flat buffers that hold the gradients of several parameters, so that one operation moves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import final

import torch
from torch import Tensor

BYTES_PER_MIB = 1024 * 1024

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""``(numel, dtype, device)`` to a tensor of shape ``(numel,)``: where a bucket's memory comes from."""


def allocate_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)


@final
class Bucket:
    """Gradients of ``parameters`` in one contiguous buffer, in that order.

    Reads like :class:`torch.distributed.GradBucket`, so that a DDP communication hook can take it.
    Every view has its parameter's shape, and its strides where those are dense: then a channels-last
    gradient is copied without reordering, as DDP does.

    Args:
        index: Position in the launch order.
        parameters: All of one dtype and one device.
        is_last: Whether it is the last bucket of a backward pass.
        allocate: Where the buffer's memory comes from.
    """

    def __init__(
        self, index: int, parameters: list[Tensor], is_last: bool, allocate: Allocate = allocate_zeros
    ) -> None:
        first = parameters[0]
        self._index = index
        self._is_last = is_last
        self._parameters = parameters
        self._buffer = allocate(sum(p.numel() for p in parameters), first.dtype, first.device)
        self.slices = list(self._buffer.split([p.numel() for p in parameters]))
        """Each gradient as a 1-D contiguous part of the buffer."""
        self.views = [view_like(part, p) for part, p in zip(self.slices, parameters, strict=True)]

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last

    def buffer(self) -> Tensor:
        return self._buffer

    def set_buffer(self, tensor: Tensor) -> None:
        """Take over the values of ``tensor`` (shape and dtype of the buffer)."""
        if tensor.data_ptr() != self._buffer.data_ptr():
            self._buffer.copy_(tensor)

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        return self.views

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill their memory without gaps or overlaps, in any order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """1-D ``flat`` in the parameter's shape, and in its strides where those are dense; no copy."""
    if is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def _fill(parameters: Iterable[Tensor], max_bytes: int, first_max_bytes: int) -> Iterator[list[Tensor]]:
    """Runs of ``parameters`` of one dtype and device, none larger than its limit unless it is one tensor."""
    run: list[Tensor] = []
    size = 0
    limit = first_max_bytes
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        same_kind = not run or (parameter.dtype, parameter.device) == (run[0].dtype, run[0].device)
        if run and (not same_kind or size + num_bytes > limit):
            yield run
            run, size, limit = [], 0, max_bytes
        run.append(parameter)
        size += num_bytes
    if run:
        yield run


def build_buckets(
    parameters: Iterable[Tensor],
    bucket_mib: float,
    first_bucket_mib: float | None = None,
    allocate: Allocate = allocate_zeros,
) -> list[Bucket]:
    """Cut ``parameters`` into buckets of at most ``bucket_mib`` MiB, keeping their order.

    A larger parameter gets a bucket of its own. The result depends on the order, shapes and dtypes only,
    so ranks that hold the same model get the same buckets without talking.
    """
    first = bucket_mib if first_bucket_mib is None else min(first_bucket_mib, bucket_mib)
    runs = list(_fill(parameters, int(bucket_mib * BYTES_PER_MIB), int(first * BYTES_PER_MIB)))
    return [Bucket(index, run, index == len(runs) - 1, allocate) for index, run in enumerate(runs)]
