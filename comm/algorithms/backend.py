"""``naive`` and ``native``: the all-reduce of the backend (gloo, NCCL), per parameter or per bucket."""

from __future__ import annotations

from typing import final

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..buckets import Bucket
from .algorithm import Algorithm, ring_bytes


@final
class NaiveAllReduce(Algorithm):
    """One blocking all-reduce per parameter: what a beginner writes, and the oracle of every other algorithm."""

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        for gradient in bucket.slices:
            dist.all_reduce(gradient, group=self.group)
        done: Future[Tensor] = Future()
        done.set_result(bucket.buffer())
        return done

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return ring_bytes(bucket.num_bytes, self.world_size)


@final
class NativeAllReduce(Algorithm):
    """One all-reduce per bucket, asynchronous."""

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=self.group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return ring_bytes(bucket.num_bytes, self.world_size)
