"""Sync mode: the workers' gradients are summed in worker order, and all of them take one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..buckets import Bucket, BufferSpec
from ..optimizers import steps_per_tensor
from ..packing import tensor_from
from .peers import Peers, Watch
from .protocol import ProtocolError
from .served import ServedOptimizer


@final
class Aggregator(ServedOptimizer):
    """A step begins when the first worker announces it and ends when every bucket was stepped.

    Gradients are multiplied by one over the number of workers (also where a worker has none, as under DDP) and summed
    in worker order whatever the order of arrival, so equal runs give equal bits.

    Args:
        are_scaled: Workers have divided their gradients already, but for those that they had to round. Then none of
            them may be lost, and sums are made in their shared memory.
        See :class:`.ServedOptimizer` for the others.

    Attributes:
        workers: Those that take part.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        num_workers: int,
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None = None,
        wire_dtype: torch.dtype | None = None,
        are_scaled: bool = False,
    ) -> None:
        super().__init__(optimizer, parameters, num_workers, part_mib, allocate, wire_dtype)
        self._are_scaled = are_scaled
        self.workers = set(range(num_workers))
        self.reset()

    def reset(self) -> None:
        """Forget the step under way and its times."""
        self._used: dict[int, list[list[bool]]] = {}
        self._info: dict[str, Any] = {}
        self._frames: dict[tuple[int, int], dict[int, Any]] = {}
        self._open = {b.index(): len(self.layout.parts(b)) for b in self.layout.buckets}
        self.reduce_ms = 0.0
        self.optimizer_ms = 0.0

    @property
    def announced(self) -> set[int]:
        """Workers that have announced the step under way."""
        return set(self._used)

    @override
    def begin(self, worker: int, info: Any) -> None:
        used = info["used"]
        self._check_used(worker, used)
        if worker in self._used:
            raise ProtocolError(f"worker {worker} announced a step twice")
        self._used[worker] = used
        if not self._info or worker == min(self.workers):  # the same on all workers, but in case: worker 0's
            self._info = info
            self._take_settings(info["groups"])

    @override
    def add(self, worker: int, bucket_index: int, part: int, payload: Any) -> None:
        if bucket_index not in self._open or worker not in self._used:
            raise ProtocolError(f"worker {worker} pushed bucket {bucket_index} out of turn")
        self.part(bucket_index, part, payload)
        frames = self._frames.setdefault((bucket_index, part), {})
        if worker in frames:
            raise ProtocolError(f"worker {worker} pushed bucket {bucket_index} part {part} twice")
        frames[worker] = payload

    def advance(self, bucket_index: int | None = None) -> Iterator[tuple[Bucket, bool]]:
        """Sum and step what is complete; yield each bucket that has new parameters (True) or none (False).

        Args:
            bucket_index: The only bucket that got something since the last call, None if any may have.
        """
        if len(self._used) < len(self.workers):
            return
        for index in list(self._open) if bucket_index is None else [bucket_index]:
            bucket = self.layout.buckets[index]
            self._reduce(bucket)
            if self._open[index] == 0 and self._may_step_alone():
                del self._open[index]
                self._set_gradients(bucket, self._sum_of(bucket).views, self._flags(bucket))
                self._step(self._info["clip"], bucket=index)
                yield bucket, self._any_used(bucket)
        if self._open and not self._may_step_alone() and not any(self._open.values()):
            self._open.clear()
            yield from self._step_all()

    @property
    def finished(self) -> bool:
        return not self._open

    def missing_workers(self) -> set[int]:
        """Workers for which the step under way still waits."""
        missing = self.workers - self.announced
        for index in self._open if not missing else ():
            bucket = self.layout.buckets[index]
            for part in range(len(self.layout.parts(bucket))):
                missing |= set(self._pushers(bucket)) - self._frames.get((index, part), {}).keys()
        return missing

    def lose(self, worker: int) -> None:
        """Go on without ``worker``: the average of a part is over those that are there when it is made."""
        self.workers.discard(worker)
        self._used.pop(worker, None)
        for frames in self._frames.values():
            frames.pop(worker, None)

    def take_in(self, worker: int) -> None:
        """``worker`` takes part from the step on that is just beginning."""
        self.workers.add(worker)

    # -- numerics --------------------------------------------------------------------------------------------

    def _may_step_alone(self) -> bool:
        return steps_per_tensor(self.optimizer) and self._info["clip"]["algorithm"] != "norm"

    def _pushers(self, bucket: Bucket) -> list[int]:
        return [w for w in sorted(self.workers) if any(self._used[w][bucket.index()])]

    def _any_used(self, bucket: Bucket) -> bool:
        return bool(self._pushers(bucket))

    def _sum_of(self, bucket: Bucket) -> Bucket:
        """Where the sum of ``bucket`` is made: in shared memory, where the first worker has pushed it unrounded."""
        pushers = self._pushers(bucket)
        in_place = self._shared and self._are_scaled and pushers and not self.layout.is_narrowed(bucket)
        return self._shared[pushers[0]][bucket.index()] if in_place else bucket

    @torch.no_grad()
    def _reduce(self, bucket: Bucket) -> None:
        """Average every part of ``bucket`` for which all pushes are here."""
        start_ns = time.perf_counter_ns()
        pushers = self._pushers(bucket)
        if not pushers:
            self._open[bucket.index()] = 0
        for part, (start, end) in enumerate(self.layout.parts(bucket)):
            frames = self._frames.get((bucket.index(), part), {})
            if not pushers or len(frames) < len(pushers):
                continue
            out = self._sum_of(bucket).buffer()[start:end]
            terms = [tensor_from(frames[worker], self.layout.specs[bucket.index()].dtype) for worker in pushers]
            # widened first: a product with a Python number is rounded to the dtype of the tensor
            with self.tracer.part("reduce", bucket=bucket.index(), part=part):
                self._sum([term.to(out) for term in terms], out, self._scale(bucket))
            del self._frames[bucket.index(), part]
            self._open[bucket.index()] -= 1
        self.reduce_ms += (time.perf_counter_ns() - start_ns) / 1e6

    def _scale(self, bucket: Bucket) -> float:
        return 1.0 if self._are_scaled and not self.layout.is_narrowed(bucket) else 1.0 / len(self.workers)

    @staticmethod
    def _sum(terms: list[Tensor], out: Tensor, scale: float) -> None:
        """``out``, which may be the first of ``terms``, becomes their scaled sum in their order."""
        first, *others = terms
        if first.data_ptr() != out.data_ptr():
            torch.mul(first, scale, out=out)
        for term in others:
            out.add_(term, alpha=scale)

    def _flags(self, bucket: Bucket) -> list[bool]:
        """Per parameter of ``bucket``: whether any worker used it."""
        return [any(column) for column in zip(*(used[bucket.index()] for used in self._used.values()), strict=True)]

    def step_with(self, peers: Peers, watch: Watch) -> int:
        """Do the whole step without the socket; returns the bytes."""
        num_bytes = peers.collect(self.layout.buckets, watch)
        for _ in self._step_all():
            pass
        self._open.clear()
        return num_bytes + peers.distribute(self._values, watch)

    def _step_all(self) -> Iterator[tuple[Bucket, bool]]:
        for bucket in self.layout.buckets:
            self._set_gradients(bucket, self._sum_of(bucket).views, self._flags(bucket))
        self._step(self._info["clip"])
        for bucket in self.layout.buckets:
            yield bucket, self._any_used(bucket)
