"""Averages gradients over ranks while the backward pass still runs.

Phases of one synchronizing backward pass, on every rank:

1. *collect*: a hook copies each gradient, times ``1 / world_size``, into its bucket as soon as it is ready;
2. *launch*: a full bucket is handed to the algorithm, strictly in bucket order, so that all ranks agree;
3. *finish*: buckets left over are launched, everything is waited for, ``p.grad`` becomes the averaged view.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
import torch.distributed as dist
import torch.utils.hooks
from torch import Tensor
from torch.futures import Future

from .allreduce import Algorithm
from .buckets import Bucket, build_buckets
from .timeline import Timeline


@dataclass(eq=False)
class _Slot:
    """One parameter's place in a bucket, and what the current pass knows of it."""

    parameter: Tensor
    bucket: Bucket
    view: Tensor
    dirty: bool = False
    """It has local gradients that no synchronization has averaged yet."""
    collected: bool = False


@final
class GradientReducer:
    """Replaces ``p.grad`` by its average over all ranks at the end of every backward pass.

    Every rank holds the same parameters in the same order and calls the same methods in the same order.

    Args:
        named_parameters: Those that may get gradients; frozen ones are skipped as long as they are frozen.
        algorithm: How a bucket is summed over ranks.
        control_group: Gloo group for the few bytes per step that say which parameters were used: on the host, so
            that a GPU is not waited for. Not the algorithm's group: its collectives may still be under way.
        bucket_mib: Largest bucket in MiB.
        first_bucket_mib: Size of the first bucket: a small one starts communication early.
        overlap: Reduce during the backward pass (True) or after it (False).
        timeline: Where the spans go.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        algorithm: Algorithm,
        control_group: dist.ProcessGroup,
        bucket_mib: float = 25.0,
        first_bucket_mib: float = 1.0,
        overlap: bool = True,
        timeline: Timeline | None = None,
    ) -> None:
        self._names = {p: name for name, p in named_parameters}
        self._algorithm = algorithm
        self._control_group = control_group
        self._bucket_mib = bucket_mib
        self._first_bucket_mib = first_bucket_mib
        self._overlap = overlap
        self.timeline = timeline or Timeline()
        self._scale = 1.0 / algorithm.world_size
        self._sync = True
        self._in_pass = False
        self._pending: list[tuple[Bucket, Future[Tensor]]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.buckets: list[Bucket] = []
        self._slots: dict[Tensor, _Slot] = {}
        self._build()

    def _build(self) -> None:
        """Lay out buckets for all parameters that require gradients now, and those that ever did."""
        chosen = [p for p in self._names if p.requires_grad or p in self._slots]
        dirty = {p for p, slot in self._slots.items() if slot.dirty}
        # Gradients become ready roughly in reverse order of construction.
        self.buckets = build_buckets(
            reversed(chosen), self._bucket_mib, self._first_bucket_mib, self._algorithm.allocate
        )
        self._slots = {
            p: _Slot(p, bucket, view, dirty=p in dirty)
            for bucket in self.buckets
            for p, view in zip(bucket.parameters(), bucket.views, strict=True)
        }
        self._remove_hooks()
        self._handles = [  # not earlier: torch refuses hooks on frozen parameters
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, slot)) for p, slot in self._slots.items()
        ]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate local gradients, as ``DistributedDataParallel.no_sync``."""
        previous, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = previous

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Wrap one backward pass. On leaving, gradients are final on every rank (unless in :meth:`no_sync`).

        If the pass raises, nothing is waited for: the peers may never come.
        """
        if not self._sync:
            yield
            return
        self._begin()
        try:
            yield
            self._finish()
        finally:
            self._in_pass = False

    @property
    def idle(self) -> bool:
        """Whether nothing is under way: after a failed pass a collective may still wait for a peer."""
        return not self._pending

    def close(self) -> None:
        """Remove the hooks and release the algorithm. Gradients stay as they are."""
        self._remove_hooks()
        self._algorithm.close()

    # -- collect ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if any(p.requires_grad and p not in self._slots for p in self._names):
            self._build()  # unfrozen since; every rank runs the same schedule, so all rebuild together
        self._missing = [0] * len(self.buckets)
        for slot in self._slots.values():
            slot.collected = False
            self._missing[slot.bucket.index()] += slot.parameter.requires_grad
        self._queue = [bucket for bucket in self.buckets if self._missing[bucket.index()]]
        self._next = 0
        self._pending.clear()
        self._in_pass = True

    def _on_gradient(self, slot: _Slot, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(
                f"parameter {self._names[parameter]!r} has a sparse gradient, which cannot be averaged here: "
                "use a dense layer (for embeddings: sparse=False) or --trainer.strategy ddp"
            )
        slot.dirty = True
        if not (self._in_pass and self._overlap):
            return
        if slot.collected:
            raise RuntimeError(
                f"the gradient of {self._names[parameter]!r} became ready twice in one backward pass (reentrant "
                "activation checkpointing does that): set --trainer.strategy.overlap false"
            )
        self._collect(slot)
        self._launch_ready()

    @torch.no_grad()
    def _collect(self, slot: _Slot) -> None:
        """Scale a gradient into its bucket; from then on it lives there only, so its own memory is free again."""
        gradient = slot.parameter.grad
        if gradient is None:
            slot.view.zero_()
        else:
            torch.mul(gradient, self._scale, out=slot.view)
            slot.parameter.grad = slot.view
        slot.collected = True
        self._missing[slot.bucket.index()] -= 1

    # -- launch ----------------------------------------------------------------------------------------------

    def _launch_ready(self) -> None:
        while self._next < len(self._queue) and self._missing[self._queue[self._next].index()] == 0:
            self._launch(self._queue[self._next])
            self._next += 1

    def _launch(self, bucket: Bucket) -> None:
        start_ns = time.perf_counter_ns()
        num_bytes = self._algorithm.num_bytes(bucket)
        future = self._algorithm.start(bucket)

        def record(done: Future[Tensor]) -> Tensor:
            self.timeline.add_span(start_ns, time.perf_counter_ns(), num_bytes)
            return done.value()

        self._pending.append((bucket, future.then(record)))

    # -- finish ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.timeline.gradients_ready()
        for slot in self._slots.values():
            if slot.parameter.requires_grad and not slot.collected:
                self._collect(slot)
        used, control = self._share_used_mask()
        self._launch_ready()
        for bucket, future in self._pending:
            bucket.set_buffer(future.wait())
        self._pending.clear()
        control.wait()
        self._publish(used)
        self.timeline.synchronized()

    def _share_used_mask(self) -> tuple[Tensor, dist.Work]:
        """Start the control all-reduce: 1 for every parameter that some rank used, in the slots' order."""
        mask = torch.tensor([slot.dirty for slot in self._slots.values()], dtype=torch.uint8)
        work = dist.all_reduce(mask, dist.ReduceOp.MAX, group=self._control_group, async_op=True)
        assert work is not None
        return mask, work

    def _publish(self, used: Tensor) -> None:
        """Let ``p.grad`` be the averaged view; a parameter that no rank used keeps ``grad=None``."""
        for slot, was_used in zip(self._slots.values(), used.tolist(), strict=True):
            if was_used and slot.parameter.requires_grad:
                slot.parameter.grad = slot.view
            slot.dirty = False
