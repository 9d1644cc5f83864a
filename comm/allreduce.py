"""Named ways to average a bucket over all ranks.

An :class:`Algorithm` starts one bucket at a time, in the same order on every rank, and returns a future of
the averaged gradient. ``naive`` is what a beginner writes; it is the oracle of every other algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from .buckets import Bucket, allocate_zeros


class Algorithm(ABC):
    """Averages buckets over the ranks of ``group``.

    The reducer hands over gradients already multiplied by ``1 / world_size`` (as DDP does, so that results
    agree to the bit), hence an algorithm sums.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a bucket: zeros of shape ``(numel,)``."""
        return allocate_zeros(numel, dtype, device)

    @abstractmethod
    def start(self, bucket: Bucket) -> Future[Tensor]:
        """Begin summing ``bucket`` (called on all ranks, in the same order); the future holds the sum.

        The bucket's buffer must not be touched until the future is done.
        """

    @abstractmethod
    def num_bytes(self, bucket: Bucket) -> int:
        """Bytes this rank sends plus receives for ``bucket``."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what the algorithm holds."""


def ring_bytes(num_bytes: int, world_size: int) -> int:
    """Sent plus received by one rank in a ring all-reduce of ``num_bytes``: 2 (n-1)/n of the data each way.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    Gloo's and NCCL's default for large messages moves the same amount.
    """
    return 4 * (world_size - 1) * num_bytes // world_size


@final
class NaiveAllReduce(Algorithm):
    """One blocking all-reduce per parameter."""

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
    """The backend's own all-reduce (gloo, NCCL), one per bucket, asynchronous."""

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=self.group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return ring_bytes(bucket.num_bytes, self.world_size)


ALGORITHMS: dict[str, type[Algorithm]] = {"naive": NaiveAllReduce, "native": NativeAllReduce}
