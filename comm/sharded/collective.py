"""``collective``: reduce-scatter and all-gather of the backend (gloo, NCCL); any device, any number of hosts.

Collectives move equal parts: a bucket's slices are copied into the rows of a matrix, one row per rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ..algorithms.algorithm import BlockingAlgorithm
from ..buckets import Bucket
from ..timeline import Timeline
from .layout import ShardPlan
from .transport import Transport, one_way_bytes

# torch 2.14 gave them other names and warns of the old ones
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@final
class _Rows:
    """A bucket's slices, one per row of a matrix as wide as the widest of them."""

    def __init__(self, plan: ShardPlan) -> None:
        width = max(end - start for start, end in plan.slices)
        self._slices = plan.slices
        self.matrix = torch.zeros(len(plan.slices), width, dtype=plan.spec.dtype, device=plan.spec.device)

    def fill(self, flat: Tensor, rank: int) -> None:
        start, end = self._slices[rank]
        self.matrix[rank, : end - start].copy_(flat[start:end])

    def empty(self, flat: Tensor, rank: int) -> None:
        start, end = self._slices[rank]
        flat[start:end].copy_(self.matrix[rank, : end - start])


@final
class CollectiveReduceScatter(BlockingAlgorithm):
    """One reduce-scatter per bucket. Gloo's has no future: a thread waits for it."""

    operation = "reduce_scatter"

    def __init__(self, group: dist.ProcessGroup, plans: Sequence[ShardPlan]) -> None:
        super().__init__(group)
        self._plans = plans
        self._rows = [_Rows(plan) for plan in plans]
        self._sums = [torch.empty_like(rows.matrix[0]) for rows in self._rows]

    @override
    def reduce(self, bucket: Bucket) -> None:
        rows, total = self._rows[bucket.index()], self._sums[bucket.index()]
        for rank in range(self.world_size):
            rows.fill(bucket.buffer(), rank)
        _reduce_scatter(total, rows.matrix.view(-1), group=self.group)
        start, end = self._plans[bucket.index()].slices[self.rank]
        bucket.buffer()[start:end].copy_(total[: end - start])

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return one_way_bytes(self._plans[bucket.index()], self.rank)


@final
class CollectiveTransport(Transport):
    """See the module. Its methods are called on all ranks of ``group``, on which nothing else travels."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup, plans: Sequence[ShardPlan], timeline: Timeline) -> None:
        super().__init__(plans, dist.get_rank(group), dist.get_world_size(group), timeline)
        self._group = group
        self.reduce_scatter = CollectiveReduceScatter(group, plans)
        self.values = [torch.zeros(p.spec.numel, dtype=p.spec.dtype, device=p.spec.device) for p in plans]
        self._rows = [_Rows(plan) for plan in plans]
        self._pending: list[tuple[int, int, dist.Work]] = []

    @override
    def begin_step(self) -> None:
        self._pending.clear()

    @override
    def publish(self, index: int) -> None:
        rows = self._rows[index]
        rows.fill(self.values[index], self.rank)
        start_ns = time.perf_counter_ns()
        own = rows.matrix[self.rank].clone()  # gloo wants the input outside of the output
        with self._timeline.tracer.range("all_gather", bucket=index):
            work = _all_gather(rows.matrix.view(-1), own, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((index, start_ns, work))

    @override
    def end_step(self) -> None:
        with self._waiting("wait for all parameters"):
            for index, start_ns, work in self._pending:
                work.wait()
                end_ns, num_bytes = time.perf_counter_ns(), self.num_bytes(index)
                self._timeline.add_span(start_ns, end_ns, num_bytes, "all_gather", bucket=index)
                for rank in range(self.world_size):
                    if rank != self.rank:
                        self._rows[index].empty(self.values[index], rank)
        self._pending.clear()
