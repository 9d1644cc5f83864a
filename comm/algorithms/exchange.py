"""Sums made of messages between ranks: a plan says who sends what to whom, one loop carries it out.

The plan is a pure function of a rank's place and the bucket's size. What is sent and the bytes that are reported
both come from it, so they cannot disagree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ..buckets import Bucket
from .algorithm import BlockingAlgorithm

_PIECE_BYTES = 512 * 1024
"""A CPU message travels in pieces of this size: one is added, still in the cache, while the next arrives."""


@final
@dataclass(frozen=True)
class Message:
    """Elements ``start`` to ``end`` of the buffer. If there are none, nothing is sent."""

    peer: int
    """Rank in the algorithm's group that it goes to or comes from."""
    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start


NOTHING = Message(peer=-1, start=0, end=0)


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank sends and receives at the same time; the two do not overlap in the buffer."""

    outgoing: Message = NOTHING
    incoming: Message = NOTHING
    adds: bool
    """Whether what comes in is added to the buffer or replaces it."""

    @property
    def numel(self) -> int:
        return self.outgoing.numel + self.incoming.numel


def bytes_of(steps: Iterable[Step], itemsize: int) -> int:
    """Sent plus received by the rank whose ``steps`` they are."""
    return sum(step.numel for step in steps) * itemsize


class PlannedAllReduce(BlockingAlgorithm):
    """Carries out a plan of :class:`Step` on every bucket, by point-to-point operations of the backend.

    Ranks end up equal to the bit if every element's sum is completed on one rank and copied from there.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._plans: dict[int, list[Step]] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._failure: str | None = None

    @abstractmethod
    def plan(self, numel: int) -> list[Step]:
        """This rank's steps for a bucket of ``numel`` elements. They match the other ranks', which are not asked."""

    def _steps(self, bucket: Bucket) -> list[Step]:
        numel = bucket.buffer().numel()
        if numel not in self._plans:
            self._plans[numel] = [step for step in self.plan(numel) if step.numel]
        return self._plans[numel]

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return bytes_of(self._steps(bucket), bucket.buffer().element_size())

    @override
    def reduce(self, bucket: Bucket) -> None:
        if self._failure is not None:  # messages of the failed bucket would be taken for this one's
            raise RuntimeError(f"an earlier bucket failed: {self._failure}")
        try:
            for step in self._steps(bucket):
                self._exchange(step, bucket.buffer())
        except Exception as error:
            self._failure = str(error)
            raise

    def _exchange(self, step: Step, flat: Tensor) -> None:
        target = flat[step.incoming.start : step.incoming.end]
        landing = self._scratch_like(target) if step.adds else target
        receives = self._operations(dist.irecv, landing, step.incoming.peer)
        sends = self._operations(dist.isend, flat[step.outgoing.start : step.outgoing.end], step.outgoing.peer)
        # in one batch: NCCL would end the first before it begins the second, and so would the peer
        works = dist.batch_isend_irecv(receives + sends)
        for work, part, arrived in zip(works, _pieces(target), _pieces(landing), strict=False):
            work.wait()
            if step.adds:
                part.add_(arrived)
        for work in works[len(receives) :]:  # NCCL has one work for the whole batch
            work.wait()

    def _operations(self, kind: Callable[..., dist.Work | None], part: Tensor, peer: int) -> list[dist.P2POp]:
        return [dist.P2POp(kind, piece, group=self.group, group_peer=peer) for piece in _pieces(part)]

    def _scratch_like(self, part: Tensor) -> Tensor:
        """Where ``part`` lands before it is added; kept, as new memory costs a page fault every 4 KiB."""
        kind = (part.dtype, part.device)
        if kind not in self._scratch or self._scratch[kind].numel() < part.numel():
            self._scratch[kind] = torch.empty_like(part)
        return self._scratch[kind][: part.numel()]


def _pieces(part: Tensor) -> list[Tensor]:
    """What travels at a time; sender and receiver cut alike, as their parts are equally long."""
    if part.numel() == 0:
        return []
    return list(part.split(_PIECE_BYTES // part.element_size())) if part.is_cpu else [part]  # NCCL cuts by itself
