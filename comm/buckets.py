"""Flat buffers that hold the gradients of several parameters, so that one operation moves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

BYTES_PER_MIB = 1024 * 1024
FIRST_BUCKET_MIB = 1.0
"""DDP's: a small first bucket starts communication early."""
ALIGNMENT = 64
"""Bytes; torch's own tensors on the CPU begin at multiples of it, and kernels may round by where a tensor begins."""


@dataclass(frozen=True)
class BufferSpec:
    """A bucket's memory before it exists: shape ``(numel,)``."""

    numel: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameters: Sequence[Tensor], aligned: bool = False) -> BufferSpec:
        first = parameters[0]
        return cls(sum(room_for(p, aligned) for p in parameters), first.dtype, first.device)


@final
class Bucket:
    """Gradients of ``parameters`` in one contiguous buffer, in that order.

    Every view has its parameter's shape, and its strides where those are dense: then a channels-last
    gradient is copied without reordering, as DDP does.

    Args:
        index: Position in the launch order.
        parameters: All of one dtype and one device.
        is_last: Whether it is the last bucket of a backward pass.
        buffer: Its memory, of the shape that :class:`BufferSpec` says.
        aligned: Each gradient begins at a multiple of :data:`ALIGNMENT` bytes; nothing is read from between them.
    """

    def __init__(
        self, index: int, parameters: list[Tensor], is_last: bool, buffer: Tensor, aligned: bool = False
    ) -> None:
        self._index = index
        self._is_last = is_last
        self._parameters = parameters
        self._buffer = buffer
        self.slices = split(self._buffer, parameters, aligned)
        """Each gradient as a 1-D contiguous part of the buffer."""
        self.views = [view_like(part, p) for part, p in zip(self.slices, parameters, strict=True)]

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last

    def buffer(self) -> Tensor:
        return self._buffer

    def take(self, tensor: Tensor) -> None:
        """Take over the values of ``tensor`` (shape of the buffer); no copy if they are in the buffer already."""
        if tensor.data_ptr() != self._buffer.data_ptr():
            self._buffer.copy_(tensor)

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        return self.views

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()


def room_for(parameter: Tensor, aligned: bool) -> int:
    """Elements that it takes in a buffer."""
    per_line = ALIGNMENT // parameter.element_size() if aligned else 1
    return -(-parameter.numel() // per_line) * per_line


def split(buffer: Tensor, parameters: Sequence[Tensor], aligned: bool = False) -> list[Tensor]:
    """The part of 1-D ``buffer`` that belongs to each parameter, 1-D; no copies."""
    parts = buffer.split([room_for(p, aligned) for p in parameters])
    return [part[: p.numel()] for part, p in zip(parts, parameters, strict=True)]


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill their memory without gaps or overlaps, in any order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """1-D ``flat`` in the parameter's shape, and in its strides where those are dense; no copy."""
    if is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def apart(flat: Tensor) -> Tensor:
    """The same memory as a storage of its own: ``torch.save`` writes storages, and a shared one holds everything."""
    if not flat.is_cpu:
        return flat
    return torch.from_numpy(flat.view(torch.uint8).numpy()).view(flat.dtype)


def ddp_layout(parameters: Iterable[Tensor], max_bytes: int, first_max_bytes: int | None = None) -> list[list[Tensor]]:
    """Cut ``parameters`` into buckets exactly as DistributedDataParallel does (``_compute_bucket_assignment_by_size``).

    A bucket is full when it *reaches* its limit, which is ``first_max_bytes`` for the first one of a dtype and
    device. The same layout makes sums of three and more ranks round as under DDP.
    """
    full: list[list[Tensor]] = []
    begun: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        begun.setdefault(kind, []).append(parameter)
        room[kind] = room.get(kind, max_bytes if first_max_bytes is None else first_max_bytes) - parameter.nbytes
        if room[kind] <= 0:
            full.append(begun.pop(kind))
            room[kind] = max_bytes
    return full + list(begun.values())


def layout_in_ready_order(
    order: Iterable[Tensor], bucket_mib: float, first_bucket_mib: float = FIRST_BUCKET_MIB
) -> list[list[Tensor]]:
    """The buckets of DDP and of our reducer from the second step on, for parameters as their gradients get ready."""
    max_bytes, first = (int(mib * BYTES_PER_MIB) for mib in (bucket_mib, first_bucket_mib))
    return ddp_layout(order, max_bytes, min(first, max_bytes))


def bounded_layout(parameters: Iterable[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Runs of ``parameters`` of one dtype and device, none larger than ``max_bytes`` unless it is one tensor."""
    runs: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        run = runs[-1] if runs else []
        same_kind = bool(run) and (parameter.dtype, parameter.device) == (run[0].dtype, run[0].device)
        if not same_kind or size + parameter.nbytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += parameter.nbytes
    return runs


def make_buckets(
    layout: Sequence[list[Tensor]], buffers: Iterable[Tensor] | None = None, first: int = 0, aligned: bool = False
) -> list[Bucket]:
    """Buckets of a layout, from number ``first``, in ``buffers`` (one each, see :class:`BufferSpec`) or new memory."""
    if buffers is None:
        specs = [BufferSpec.of(run, aligned) for run in layout]
        buffers = [torch.zeros(spec.numel, dtype=spec.dtype, device=spec.device) for spec in specs]
    last = first + len(layout) - 1
    runs = enumerate(zip(layout, buffers, strict=True), first)
    return [Bucket(i, run, i == last, buffer, aligned) for i, (run, buffer) in runs]
