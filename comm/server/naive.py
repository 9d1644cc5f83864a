"""The parameter server as a beginner writes it: one blocking send and one recv per parameter and worker.

Kept as oracle of the real transport and as the benchmark's baseline. Only gradients and parameters travel this
way; everything else uses the socket.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from ..buckets import Bucket
from .peers import Watch


@final
class NaivePeers:
    """:class:`.Peers` as a gloo group of the server (rank 0) and the workers (rank 1 and up).

    Constructing blocks until all of them are here.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timeout)  # torch's stubs lack send and recv
        self._num_workers = size - 1

    @torch.no_grad()
    def push_pull(self, buckets: list[Bucket], watch: Watch) -> int:
        parameters = [p for bucket in buckets for p in bucket.parameters()]
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._group.send([gradient.cpu().contiguous()], 0, 0).wait()
        for parameter in parameters:
            received = torch.empty(parameter.shape, dtype=parameter.dtype)
            self._group.recv([received], 0, 0).wait()
            parameter.copy_(received)
        return 2 * sum(p.nbytes for p in parameters)

    @torch.no_grad()
    def collect(self, buckets: list[Bucket], watch: Watch) -> int:
        for view in (view for bucket in buckets for view in bucket.views):
            total = torch.zeros(view.shape, dtype=view.dtype)
            for worker in range(self._num_workers):
                received = torch.empty_like(total)
                self._group.recv([received], worker + 1, 0).wait()
                total += received * (1.0 / self._num_workers)
            view.copy_(total)
        return self._num_workers * sum(bucket.num_bytes for bucket in buckets)

    @torch.no_grad()
    def distribute(self, buckets: list[Bucket], watch: Watch) -> int:
        for view in (view for bucket in buckets for view in bucket.views):
            for worker in range(self._num_workers):
                self._group.send([view.cpu().contiguous()], worker + 1, 0).wait()
        return self._num_workers * sum(bucket.num_bytes for bucket in buckets)

    def abort(self) -> None:
        self._group.abort()
