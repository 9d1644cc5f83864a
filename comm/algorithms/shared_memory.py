"""``shared_memory``: ranks of one host sum buckets that all of them have mapped. CPU tensors only.

Phases of every bucket; a rank begins one when all ranks have ended the one before:

1. *fill*: the reducer copies this rank's gradients into its own arena;
2. *reduce*: rank r sums slice r of all arenas, in rank order, and writes the sum back into all of them;
3. from then on the whole sum is in every arena, which nobody else touches any more.

A chunk is still in the cache when it is written back: fewer bytes move through memory than if every rank kept its
own slices and copied those of the others.
Summation in rank order makes the result the same on all ranks, and independent of the bucket size, to the bit.
"""

from __future__ import annotations

import itertools
import queue
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..buckets import Bucket, BufferSpec
from ..shared_memory import HostGroup
from ..shared_memory.host_group import ALIGNMENT
from .algorithm import BackgroundAlgorithm, Job, ring_bytes

_FILLED, _REDUCED = range(2)

CHUNK_BYTES = 256 * 1024
"""What is summed at a time: all terms of a chunk stay in the cache of a core."""


@dataclass(frozen=True)
class _Shared:
    """A bucket's memory on all ranks."""

    ranks: HostGroup
    arenas: list[Tensor]
    """Rank i's buffer, all of one shape."""
    start: int
    end: int
    """This rank sums the elements from ``start`` to ``end``."""


class SharedMemoryAlgorithm(BackgroundAlgorithm):
    """Reduces a bucket, then leaves it when all ranks have."""

    @abstractmethod
    def reduce(self, bucket: Bucket) -> None:
        """Do this rank's part of the sum and tell the others; blocks until they have filled the bucket."""

    @abstractmethod
    def leave(self, bucket: Bucket) -> None:
        """Block until all ranks have reduced it."""

    @override
    def work(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        """Reducing a later bucket goes before the end of an earlier one: the peers wait only for the former."""
        reduced: deque[Job] = deque()
        while True:
            try:
                job = jobs.get(block=not reduced)
            except queue.Empty:
                job = reduced.popleft()
                if self.attempt(self.leave, job):
                    job[1].set_result(job[0].buffer())
                continue
            if job is None:
                return
            if self.attempt(self.reduce, job):
                reduced.append(job)


@final
class SharedMemoryAllReduce(SharedMemoryAlgorithm):
    """See the module.

    Args:
        timeout_s: How long a rank waits for one that is alive.

    Raises:
        SharedMemoryError: (:meth:`allocate`) the ranks are on several hosts, or there is too little memory.
        PeerLost: (the futures) a peer has ended or does not come.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float = 300.0) -> None:
        super().__init__(group)
        self._timeout_s = timeout_s
        self._shared: dict[int, _Shared] = {}

    @override
    def allocate(self, specs: Sequence[BufferSpec]) -> list[Tensor]:
        sizes = [round_up(spec.numel * spec.dtype.itemsize, ALIGNMENT) for spec in specs]
        ranks = HostGroup(self.group, sum(sizes), self._timeout_s)
        starts = itertools.accumulate(sizes, initial=0)
        made = [self._share(ranks, start, spec) for start, spec in zip(starts, specs, strict=False)]
        self._shared |= {id(shared.arenas[self.rank]): shared for shared in made}
        return [shared.arenas[self.rank] for shared in made]

    def _share(self, ranks: HostGroup, start: int, spec: BufferSpec) -> _Shared:
        arenas = [ranks.tensor(rank, start, spec.numel, spec.dtype) for rank in range(self.world_size)]
        per_line = ALIGNMENT // spec.dtype.itemsize
        per_rank = round_up(-(-spec.numel // self.world_size), per_line)  # no two ranks write to one cache line
        start, end = (min(rank * per_rank, spec.numel) for rank in (self.rank, self.rank + 1))
        return _Shared(ranks, arenas, start, end)

    @override
    def release(self, buffers: Sequence[Tensor]) -> None:
        for buffer in buffers:
            self._shared.pop(id(buffer)).ranks.close()

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        self._of(bucket).ranks.ring(_FILLED)
        return super().start(bucket)

    def _of(self, bucket: Bucket) -> _Shared:
        return self._shared[id(bucket.buffer())]

    @override
    def reduce(self, bucket: Bucket) -> None:
        shared = self._of(bucket)
        shared.ranks.wait(_FILLED)
        step = CHUNK_BYTES // bucket.buffer().element_size()
        for first in range(shared.start, shared.end, step):
            sum_into_all([arena[first : min(first + step, shared.end)] for arena in shared.arenas])
        shared.ranks.ring(_REDUCED)

    @override
    def leave(self, bucket: Bucket) -> None:
        self._of(bucket).ranks.wait(_REDUCED)

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        """What this rank reads from and writes to others' arenas, and others in its own: as much as in a ring."""
        return ring_bytes(bucket.num_bytes, self.world_size)

    @override
    def close(self) -> None:
        for shared in self._shared.values():
            shared.ranks.close()  # first: the thread may be waiting for a peer there
        super().close()


def sum_into_all(terms: list[Tensor]) -> None:
    """Add up ``terms`` in their order; each of them is the sum afterwards."""
    total, *others = terms
    for term in others:
        total.add_(term)
    for term in others:
        term.copy_(total)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
