"""``shared_memory``: ranks of one host sum buckets that all of them have mapped. CPU tensors only.

Phases of every bucket; a rank begins one when all ranks have ended the one before:

1. *fill*: the reducer copies this rank's gradients into its own arena;
2. *reduce*: rank r sums slice r over all arenas, in rank order, into its own arena;
3. *gather*: every rank copies the other slices from their owners;
4. from then on a rank may change its arena, as nobody reads it any more.

Summation in rank order makes the result the same on all ranks, and independent of the bucket size, to the bit.
"""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..buckets import Bucket, BufferSpec
from ..shared_memory import HostGroup
from ..shared_memory.host_group import ALIGNMENT, NUM_BELLS
from .algorithm import BackgroundAlgorithm, Job, ring_bytes

_FILLED, _REDUCED, _GATHERED = range(NUM_BELLS)

_CHUNK_BYTES = 1024 * 1024
"""What is summed at a time: all terms of a chunk stay in the cache of a core."""


@dataclass(frozen=True)
class _Shared:
    """A bucket's memory on all ranks."""

    ranks: HostGroup
    arenas: list[Tensor]
    """Rank i's buffer, all of one shape."""
    bounds: list[int]
    """Rank i owns elements ``bounds[i]`` to ``bounds[i + 1]``."""


@final
class SharedMemoryAllReduce(BackgroundAlgorithm):
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
        self._scratch: dict[torch.dtype, Tensor] = {}

    @override
    def allocate(self, specs: Sequence[BufferSpec]) -> list[Tensor]:
        sizes = [-(-spec.numel * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT for spec in specs]
        ranks = HostGroup(self.group, sum(sizes), self._timeout_s)
        starts = itertools.accumulate(sizes, initial=0)
        made = [self._share(ranks, start, spec) for start, spec in zip(starts, specs, strict=False)]
        self._shared |= {id(shared.arenas[self.rank]): shared for shared in made}
        return [shared.arenas[self.rank] for shared in made]

    def _share(self, ranks: HostGroup, start: int, spec: BufferSpec) -> _Shared:
        arenas = [ranks.tensor(rank, start, spec.numel, spec.dtype) for rank in range(self.world_size)]
        step = -(-spec.numel // self.world_size)
        aligned = -(-step // (ALIGNMENT // spec.dtype.itemsize)) * (ALIGNMENT // spec.dtype.itemsize)
        return _Shared(ranks, arenas, [min(rank * aligned, spec.numel) for rank in range(self.world_size + 1)])

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
    def work(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        """Earlier phases of later buckets go first: peers wait for them, nobody but this rank for the end."""
        reduced: deque[Job] = deque()
        gathered: deque[Job] = deque()
        while True:
            try:
                job = jobs.get(block=not reduced and not gathered)
            except queue.Empty:
                self._advance(reduced, gathered)
                continue
            if job is None:
                return
            if self.attempt(self._reduce, job):
                reduced.append(job)

    def _advance(self, reduced: deque[Job], gathered: deque[Job]) -> None:
        if reduced:
            job = reduced.popleft()
            if self.attempt(self._gather, job):
                gathered.append(job)
        else:
            job = gathered.popleft()
            if self.attempt(self._leave, job):
                job[1].set_result(job[0].buffer())

    def _reduce(self, bucket: Bucket) -> None:
        shared = self._of(bucket)
        shared.ranks.wait(_FILLED)
        self._reduce_own_slice(shared)
        shared.ranks.ring(_REDUCED)

    def _gather(self, bucket: Bucket) -> None:
        shared = self._of(bucket)
        shared.ranks.wait(_REDUCED)
        for owner, arena in enumerate(shared.arenas):
            if owner != self.rank:
                part = slice(shared.bounds[owner], shared.bounds[owner + 1])
                shared.arenas[self.rank][part].copy_(arena[part])
        shared.ranks.ring(_GATHERED)

    def _leave(self, bucket: Bucket) -> None:
        self._of(bucket).ranks.wait(_GATHERED)

    def _reduce_own_slice(self, shared: _Shared) -> None:
        start, end = shared.bounds[self.rank : self.rank + 2]
        step = _CHUNK_BYTES // shared.arenas[0].element_size()
        for first in range(start, end, step):
            self._sum([arena[first : min(first + step, end)] for arena in shared.arenas])

    def _sum(self, terms: list[Tensor]) -> None:
        """Add up ``terms`` in their order, into the one of this rank."""
        mine = terms[self.rank]
        if self.rank < 2:  # the own term is used up by the first addition
            total = torch.add(terms[0], terms[1], out=mine) if len(terms) > 1 else mine
        else:
            total = torch.add(terms[0], terms[1], out=self._scratch_like(mine))
        for number, term in enumerate(terms[2:], 2):
            total = torch.add(total, term, out=mine if number >= self.rank else total)

    def _scratch_like(self, chunk: Tensor) -> Tensor:
        if chunk.dtype not in self._scratch:
            self._scratch[chunk.dtype] = torch.empty(_CHUNK_BYTES // chunk.element_size(), dtype=chunk.dtype)
        return self._scratch[chunk.dtype][: chunk.numel()]

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        """What others read from this rank, plus what it reads from them: as much as in a ring."""
        return ring_bytes(bucket.num_bytes, self.world_size)

    @override
    def close(self) -> None:
        super().close()
        for shared in self._shared.values():
            shared.ranks.close()
