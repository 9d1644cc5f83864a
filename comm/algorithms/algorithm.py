"""The seam: an algorithm averages buckets over ranks, one after the other, in the same order on every rank."""

from __future__ import annotations

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..buckets import Bucket, BufferSpec


class AlgorithmUnavailable(ValueError):
    """The algorithm that was asked for cannot run here; the text says why, and which would."""


class Algorithm(ABC):
    """Averages buckets over the ranks of ``group``. Its methods are called on all ranks in the same order.

    Attributes:
        scale: What the reducer multiplies a gradient with when it copies it into its bucket. By default
            ``1 / world_size``, as DDP does, so that results agree to the bit; hence an algorithm sums.
        operation: What traces and profilers call it.
    """

    operation = "all_reduce"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.scale = 1.0 / self.world_size

    def allocate(self, specs: Sequence[BufferSpec]) -> list[Tensor]:
        """Memory for the buckets of one layout, zeros. May block until all ranks have called it."""
        return [torch.zeros(spec.numel, dtype=spec.dtype, device=spec.device) for spec in specs]

    def release(self, buffers: Sequence[Tensor]) -> None:  # noqa: B027 (most need not know)
        """The buckets that :meth:`allocate` returned ``buffers`` for are gone; views of them may live on."""

    @abstractmethod
    def start(self, bucket: Bucket) -> Future[Tensor]:
        """Begin summing ``bucket``; the future holds the sum.

        The bucket's buffer must not be touched until the future is done.
        """

    @abstractmethod
    def num_bytes(self, bucket: Bucket) -> int:
        """Bytes that this rank sent plus those it received for ``bucket``, asked when it is through."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries from step to step: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; the buckets are laid out as they were then."""
        assert not state, "an algorithm that has a state loads it"

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what the algorithm holds; waits for no peer, at most a second."""


Job = tuple[Bucket, "Future[Tensor]"]

_END_S = 1.0
"""How long the thread's end is waited for: one that waits for a lost peer inside the backend is left to itself."""


class BackgroundAlgorithm(Algorithm):
    """Sums by calls that block. A thread of its own makes them, so that the backward pass goes on meanwhile.

    The thread sleeps in the kernel while it waits: one that polls takes the GIL, and a core, from the backward
    pass (measured: training is then slower than without any overlap).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._end: weakref.finalize[..., BackgroundAlgorithm] | None = None

    @abstractmethod
    def work(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        """The thread's life: do ``jobs``, set their futures, and return at None."""

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        if self._end is None:
            # a daemon: when a peer is lost nobody can call it back from the backend
            thread = threading.Thread(target=self._work, name="gradsync all-reduce", daemon=True)
            thread.start()
            # also when the interpreter exits: it aborts if a thread is just then giving tensors back
            self._end = weakref.finalize(self, _end, self._jobs, thread)
        self._jobs.put((bucket, future))
        return future

    def _work(self) -> None:
        with torch.no_grad():
            self.work(self._jobs)

    @staticmethod
    def attempt(action: Callable[[Bucket], None], job: Job) -> bool:
        """Do ``action``; if it fails, whoever waits for the job's future gets the error, and the result is False."""
        bucket, future = job
        try:
            action(bucket)
        except Exception as error:
            # without its frames: they hold the job, hence the future, in a circle that nobody would collect
            future.set_exception(error.with_traceback(None))  # pyright: ignore[reportArgumentType]
            return False
        return True

    @override
    def close(self) -> None:
        if self._end is not None:
            self._end()


def _end(jobs: queue.SimpleQueue[Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    thread.join(_END_S)


class BlockingAlgorithm(BackgroundAlgorithm):
    """One blocking call per bucket, one bucket after the other."""

    @abstractmethod
    def reduce(self, bucket: Bucket) -> None:
        """Replace the bucket's buffer by the sum over all ranks; blocks."""

    @override
    def work(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            self._do(job)
            del job  # or this bucket's memory stays until the next one comes

    def _do(self, job: Job) -> None:
        if self.attempt(self.reduce, job):
            job[1].set_result(job[0].buffer())

    @override
    def start(self, bucket: Bucket) -> Future[Tensor]:
        if not bucket.buffer().is_cuda:
            return super().start(bucket)
        job: Job = (bucket, Future())  # there, calls only enqueue work: no thread is needed
        self._do(job)
        return job[1]


def ring_bytes(num_bytes: int, world_size: int) -> int:
    """Sent plus received by one rank in a ring all-reduce of ``num_bytes``: 2 (n-1)/n of the data each way.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    Gloo's and NCCL's default for large messages moves the same amount.
    """
    return 4 * (world_size - 1) * num_bytes // world_size
