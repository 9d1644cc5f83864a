"""``shared_memory``: ranks of one host, CPU tensors. All ranks map every rank's gradients and parameters.

Phases, each with its bell:

1. *filled*: a rank has copied its gradients of a bucket into its arena; the owner of a slice sums it into its own;
2. *summed*: a rank has its slice of a bucket and reads the others' gradients no more; the backward pass ends when all
   have;
3. *entered*: a rank has come to its optimizer's step, and its parameters may be overwritten;
4. *written*: a rank has stepped its slices and written them into every rank's arena; the step ends when all have.

Every rank has parameters of its own: what a user changes in them is seen on that rank only, as under DDP. A step starts
from the owner's values. Or, if asked for, all ranks read the same parameters in place: then phase 4 writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..algorithms.shared_memory import CHUNK_BYTES, SharedMemoryAlgorithm, round_up
from ..buckets import Bucket, BufferSpec
from ..shared_memory import HostGroup
from ..shared_memory.host_group import ALIGNMENT, NUM_BELLS
from ..timeline import Timeline
from .layout import ShardPlan
from .transport import Transport, one_way_bytes

_FILLED, _SUMMED, _ENTERED, _WRITTEN = range(NUM_BELLS)

_Arenas = list[list[Tensor]]
"""Per bucket, per rank."""


@final
class SharedMemoryReduceScatter(SharedMemoryAlgorithm):
    """Sums this rank's slice in rank order, so that the result does not depend on when ranks arrive.

    Args:
        group: Of all ranks.
        ranks: The same, in shared memory.
        plans: What is in the buckets.
        arenas: Memory for them.

    Raises:
        PeerLost: (the futures) a peer has ended or does not come.
    """

    operation = "reduce_scatter"

    def __init__(self, group: dist.ProcessGroup, ranks: HostGroup, plans: Sequence[ShardPlan], arenas: _Arenas) -> None:
        super().__init__(group)
        self._ranks, self._plans, self._arenas = ranks, plans, arenas
        self._scratch = torch.empty(CHUNK_BYTES, dtype=torch.uint8)

    @override
    def allocate(self, specs: Sequence[BufferSpec]) -> list[Tensor]:
        return [arenas[self.rank] for arenas in self._arenas]

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        self._ranks.ring(_FILLED)
        return super().start(bucket)

    @override
    def reduce(self, bucket: Bucket) -> None:
        self._ranks.wait(_FILLED)
        self._sum_slice(bucket)
        self._ranks.ring(_SUMMED)

    def _sum_slice(self, bucket: Bucket) -> None:
        start, end = self._plans[bucket.index()].slices[self.rank]
        arenas, dtype = self._arenas[bucket.index()], bucket.buffer().dtype
        step = CHUNK_BYTES // dtype.itemsize
        for first in range(start, end, step):
            terms = [arena[first : min(first + step, end)] for arena in arenas]
            sum_into(terms, self.rank, self._scratch.view(dtype)[: terms[0].numel()])

    @override
    def leave(self, bucket: Bucket) -> None:
        self._ranks.wait(_SUMMED)

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return one_way_bytes(self._plans[bucket.index()], self.rank)

    @override
    def close(self) -> None:
        self._ranks.close()  # first: the thread may be waiting for a peer there
        super().close()
        self._arenas = []


def sum_into(terms: list[Tensor], own: int, scratch: Tensor) -> None:
    """``terms[own]`` becomes the sum of all, added up in their order; the others stay as they are."""
    if own < 2:  # a + b and b + a are the same bits
        total, rest = terms[own], terms[2:]
        for term in (*terms[1 - own : 2 - own], *rest):
            total.add_(term)
        return
    torch.add(terms[0], terms[1], out=scratch)
    for term in terms[2:-1]:
        scratch.add_(term)
    torch.add(scratch, terms[-1], out=terms[own])


@final
class SharedMemoryTransport(Transport):
    """See the module. Construction blocks; called on all ranks of ``group``.

    Args:
        timeout_s: How long a rank waits for one that is alive.
        in_place: All ranks have one set of parameters in common: what one of them changes, all see.

    Raises:
        SharedMemoryError: the ranks are on several hosts, or there is too little memory; on all ranks alike.
        PeerLost: (steps) a peer has ended or does not come.
    """

    name = "shared_memory"

    def __init__(
        self,
        group: dist.ProcessGroup,
        plans: Sequence[ShardPlan],
        timeout_s: float,
        timeline: Timeline,
        in_place: bool = False,
    ) -> None:
        super().__init__(plans, dist.get_rank(group), dist.get_world_size(group), timeline)
        specs = [plan.spec for plan in plans]
        arenas = self._map(group, [*specs, *specs], timeout_s)
        self._arenas = arenas[: len(plans)]
        self._in_place = in_place
        self.values = [bucket[0 if in_place else self.rank] for bucket in self._arenas]
        self.reduce_scatter = SharedMemoryReduceScatter(group, self._ranks, plans, arenas[len(plans) :])
        self._all_entered = True

    def _map(self, group: dist.ProcessGroup, specs: list[BufferSpec], timeout_s: float) -> _Arenas:
        sizes = [round_up(spec.numel * spec.dtype.itemsize, ALIGNMENT) for spec in specs]
        self._ranks = HostGroup(group, sum(sizes), timeout_s)
        starts = itertools.accumulate(sizes, initial=0)
        return [
            [self._ranks.tensor(rank, start, spec.numel, spec.dtype) for rank in range(self.world_size)]
            for spec, start in zip(specs, starts, strict=False)
        ]

    @override
    def begin_step(self) -> None:
        self._ranks.ring(_ENTERED)
        self._all_entered = False
        if self._in_place:
            with self._waiting("wait for all ranks to enter"):
                self._await_entered()

    @override
    def publish(self, index: int) -> None:
        if self._in_place:
            return
        start, end = self.plans[index].slices[self.rank]
        with self._waiting("all_gather", self.num_bytes(index), bucket=index):
            self._await_entered()
            own = self.values[index][start:end]
            for rank, arena in enumerate(self._arenas[index]):
                if rank != self.rank:
                    arena[start:end].copy_(own)

    def _await_entered(self) -> None:
        if not self._all_entered:
            self._ranks.wait(_ENTERED)
            self._all_entered = True

    @override
    def end_step(self) -> None:
        with self._waiting("wait for all parameters"):
            self._await_entered()
            self._ranks.ring(_WRITTEN)
            self._ranks.wait(_WRITTEN)
