"""Who owns what: buckets that stay as they are for a whole run, each cut into one slice per rank.

They must stay: a slice that moved to another rank would have to take its optimizer state along.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buckets import ALIGNMENT, BYTES_PER_MIB, BufferSpec, ddp_layout, room_for
from ..optimizers import is_elementwise

Slice = tuple[int, int]
"""First element in a bucket, and the one after the last."""

_FIRST_BUCKET_MIB = 1.0


class Unshardable(ValueError):
    """What was asked for cannot be divided among ranks; the text says why, and what would work."""


@final
@dataclass(frozen=True)
class ShardPlan:
    """A bucket before its memory exists. Rank ``r`` steps the elements of ``slices[r]``; slices cover the bucket."""

    optimizer: int
    """Index among the module's optimizers."""
    parameters: list[Tensor]
    slices: list[Slice]

    @property
    def spec(self) -> BufferSpec:
        return BufferSpec.of(self.parameters, aligned=True)

    @property
    def num_bytes(self) -> int:
        return self.spec.numel * self.spec.dtype.itemsize

    def bytes_of(self, rank: int) -> int:
        start, end = self.slices[rank]
        return (end - start) * self.spec.dtype.itemsize


def check_shardable(optimizers: Sequence[Optimizer]) -> None:
    """Raises :class:`Unshardable`, naming what cannot be divided."""
    seen: set[Tensor] = set()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise Unshardable(
                "LBFGS evaluates the model again within a step, which ranks that step a shard each cannot: "
                "use --trainer.strategy manual_allreduce or another optimizer"
            )
        own = {p for group in optimizer.param_groups for p in group["params"]}
        if own & seen:
            raise Unshardable(
                "a parameter is in two optimizers, and its shard can have one only: "
                "use --trainer.strategy manual_allreduce"
            )
        seen |= own


def plan_shards(
    parameters: Iterable[Tensor], optimizers: Sequence[Optimizer], bucket_mib: float, world_size: int
) -> list[ShardPlan]:
    """Buckets in launch order, the same on all ranks.

    Args:
        parameters: In the order in which the module has them; those without an optimizer stay out.
        optimizers: A bucket holds parameters of one of them, those that require gradients now.
        bucket_mib: A bucket is full when it reaches so many MiB, the first one of an optimizer at 1 MiB.
        world_size: Slices per bucket.
    """
    position = {p: i for i, p in enumerate(reversed(list(parameters)))}  # about as gradients become ready
    max_bytes, first_bytes = (int(mib * BYTES_PER_MIB) for mib in (bucket_mib, _FIRST_BUCKET_MIB))
    runs: list[tuple[int, list[Tensor]]] = []
    for number, optimizer in enumerate(optimizers):
        trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        trainable.sort(key=lambda p: position.setdefault(p, len(position)))
        runs += [(number, run) for run in ddp_layout(trainable, max_bytes, min(first_bytes, max_bytes))]
    runs.sort(key=lambda item: max(position[p] for p in item[1]))
    loads = [0] * world_size
    return [ShardPlan(number, run, _cut(run, optimizers[number], loads)) for number, run in runs]


def _cut(run: list[Tensor], optimizer: Optimizer, loads: list[int]) -> list[Slice]:
    """Slices of the bucket of ``run``; adds their bytes to ``loads``, those of every rank so far."""
    numels, itemsize = [room_for(p, aligned=True) for p in run], run[0].element_size()
    slices = cut_anywhere(numels, itemsize, len(loads)) if is_elementwise(optimizer) else cut_between(numels, loads)
    for rank, (start, end) in enumerate(slices):
        loads[rank] += (end - start) * itemsize
    return slices


def cut_anywhere(numels: Sequence[int], itemsize: int, world_size: int) -> list[Slice]:
    """Even slices in rank order, cut at multiples of 64 bytes from the begin of the tensor that is cut.

    Then every element is worked on by the same vector instructions as in the whole tensor. What is left at a tensor's
    end goes through other ones, which round differently in torch's fused optimizers.
    """
    per_line, ends = ALIGNMENT // itemsize, [0, *itertools.accumulate(numels)]
    bounds = [0]
    for rank in range(1, world_size):
        target = rank * ends[-1] / world_size
        begin, end = next((begin, end) for begin, end in itertools.pairwise(ends) if target <= end)
        bounds.append(min(begin + math.ceil((target - begin) / per_line) * per_line, end))
    return list(itertools.pairwise([*bounds, ends[-1]]))


def cut_between(numels: Sequence[int], loads: Sequence[int]) -> list[Slice]:
    """Slices of whole tensors, as even as those allow; the largest for the rank with the least of ``loads``."""
    world_size, ends = len(loads), [0, *itertools.accumulate(numels)]
    targets = [rank * ends[-1] / world_size for rank in range(1, world_size)]
    bounds = [0, *(min(ends, key=lambda end: abs(end - target)) for target in targets), ends[-1]]
    largest_first = sorted(itertools.pairwise(bounds), key=lambda part: part[0] - part[1])
    slices = [(0, 0)] * world_size
    for rank, part in zip(sorted(range(world_size), key=loads.__getitem__), largest_first, strict=True):
        slices[rank] = part
    return slices
