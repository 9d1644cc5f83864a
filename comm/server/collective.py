"""A step by collectives: one reduce to the server and one broadcast from it per bucket.

The road for NCCL, where tensors stay on the devices; over gloo it works anywhere. Only gradients and parameters
travel this way; everything else uses the socket.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from ..buckets import Bucket
from .peers import ExchangeFailed, Watch

_WATCH_EVERY_S = 0.2
_POLL_S = 0.0005
_PATIENCE = timedelta(seconds=10)
"""The collective itself gives up this much later than the server, which knows better whom to blame."""


@final
class CollectivePeers:
    """:class:`.Peers` as a process group of the server (rank 0) and the workers (rank 1 and up), beside any other.

    Workers multiply their gradients by ``1 / workers`` before the reduce, as DDP does. Constructing blocks until all
    of them are here.

    Args:
        backend: ``gloo`` or ``nccl`` (written for it, not run on it).
        start_timeout: To wait for the others at the start.
        step_timeout: How long the server waits for a worker that others wait for.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        backend: str,
        start_timeout: timedelta,
        step_timeout: timedelta,
    ) -> None:
        self._is_gloo = backend == "gloo"
        kind: Any = dist.ProcessGroupGloo if self._is_gloo else dist.ProcessGroupNCCL
        self._group: Any = kind(store, rank, size, start_timeout)
        self._num_workers = size - 1
        self._reduce = dist.ReduceOptions()
        self._broadcast = dist.BroadcastOptions()
        for options in (self._reduce, self._broadcast):
            options.rootRank = 0
            options.timeout = step_timeout + _PATIENCE

    @torch.no_grad()
    def push_pull(self, buckets: list[Bucket], watch: Watch) -> int:
        for bucket in buckets:
            for view, parameter in zip(bucket.views, bucket.parameters(), strict=True):
                if parameter.grad is None:
                    view.zero_()
                else:
                    torch.mul(parameter.grad, 1.0 / self._num_workers, out=view)
        self._run(self._group.reduce, self._reduce, buckets, watch)
        self._run(self._group.broadcast, self._broadcast, buckets, watch)
        for bucket in buckets:
            for view, parameter in zip(bucket.views, bucket.parameters(), strict=True):
                parameter.copy_(view)
        return 2 * sum(bucket.num_bytes for bucket in buckets)

    @torch.no_grad()
    def collect(self, buckets: list[Bucket], watch: Watch) -> int:
        for bucket in buckets:
            bucket.buffer().fill_(-0.0)  # x + -0.0 is x for every x; 0.0 would make 0.0 of -0.0
        self._run(self._group.reduce, self._reduce, buckets, watch)
        return self._num_workers * sum(bucket.num_bytes for bucket in buckets)

    @torch.no_grad()
    def distribute(self, buckets: list[Bucket], watch: Watch) -> int:
        self._run(self._group.broadcast, self._broadcast, buckets, watch)
        return self._num_workers * sum(bucket.num_bytes for bucket in buckets)

    def abort(self) -> None:
        self._group.abort()

    def _run(self, operation: Callable[..., Any], options: Any, buckets: list[Bucket], watch: Watch) -> None:
        """One collective per bucket, in place, all of them under way at once."""
        flats = [bucket.buffer().cpu() if self._is_gloo else bucket.buffer() for bucket in buckets]
        try:
            works = [operation([flat], options) for flat in flats]
            for work in works:
                self._wait(work, watch)
        except RuntimeError as error:
            raise ExchangeFailed(str(error)) from error
        for bucket, flat in zip(buckets, flats, strict=True):
            bucket.take(flat)

    def _wait(self, work: Any, watch: Watch) -> None:
        """Until ``work`` has ended, however long it takes: ``watch`` and the collective's own limit say when to stop.

        gloo's threads work while this one blocks. NCCL would abort everything at the limit of a wait, so it is polled.
        """
        since = time.monotonic()
        while not work.is_completed():
            if self._is_gloo:
                with contextlib.suppress(RuntimeError):  # "Operation timed out", or what the last line raises again
                    work.wait(timedelta(seconds=_WATCH_EVERY_S))
            else:
                time.sleep(_POLL_S)
            if time.monotonic() > since + _WATCH_EVERY_S:
                since = time.monotonic()
                watch()
        work.wait()
