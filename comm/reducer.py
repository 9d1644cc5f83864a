"""Averages gradients over ranks while the backward pass still runs.

Phases of one synchronizing backward pass, on every rank:

1. *collect*: a hook copies each gradient, scaled, into its bucket as soon as it is ready;
2. *launch*: a full bucket is handed to the algorithm, strictly in bucket order, so that all ranks agree;
3. *finish*: buckets left over are launched, everything is waited for, ``p.grad`` becomes the averaged view.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
import torch.utils.hooks
from torch import Tensor
from torch.futures import Future

from .algorithms.algorithm import Algorithm
from .buckets import FIRST_BUCKET_MIB, Bucket, BufferSpec, ddp_layout, layout_in_ready_order, make_buckets
from .diagnosis import stand
from .timeline import Timeline
from .tuner import BucketTuner

_retired: list[dist.ProcessGroup] = []
"""Groups of the reducer closed last. A backend thread may still be in a callback of the last step (a hook's) that
holds the group: were that the last reference, the thread would have to wait for its own end, and gloo aborts."""


@dataclass(eq=False)
class _Slot:
    """One parameter's place in a bucket, and what the current pass knows of it."""

    parameter: Tensor
    bucket: Bucket
    view: Tensor
    dirty: bool = False
    """It has local gradients that no synchronization has averaged yet."""
    collected: bool = False


@dataclass(frozen=True)
class _Launched:
    """A bucket under way."""

    bucket: Bucket
    start_ns: int
    future: Future[Tensor]
    ended: Future[int]
    """When that was done, in ns."""


@final
class GradientReducer:
    """Replaces ``p.grad`` by its average over all ranks at the end of every backward pass.

    ``p.grad`` is then a view of a bucket, which the next pass overwrites (as under DDP with
    ``gradient_as_bucket_view=True``): clone what is to last longer.

    Every rank holds the same parameters in the same order and calls the same methods in the same order.

    The first synchronizing pass uses one bucket per dtype; from the second on buckets follow the order in which
    rank 0's gradients became ready, the first one small. This is DDP's layout, so that even sums over more than
    two ranks round as under DDP (with the algorithm ``native`` and DDP's defaults).

    Args:
        named_parameters: Those that may get gradients; frozen ones are skipped as long as they are frozen.
        algorithm: How a bucket is summed over ranks.
        control_group: Gloo group for the few bytes per step that say which parameters were used: on the host, so
            that a GPU is not waited for. Not the algorithm's group: its collectives may still be under way.
        bucket_mib: A bucket is full when it reaches so many MiB.
        first_bucket_mib: The same of the first bucket: a small one starts communication early.
        overlap: Reduce during the backward pass (True) or after it (False).
        timeline: Where the spans go.
        tuner: Chooses ``bucket_mib`` in the first steps, if given.
        fixed_layout: Buckets that stay as they are, of all parameters, instead of those described above; aligned.
        own_groups: Destroyed by :meth:`close`.

    Raises:
        SharedMemoryError: there is too little memory for the buckets.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        algorithm: Algorithm,
        control_group: dist.ProcessGroup,
        bucket_mib: float = 25.0,
        first_bucket_mib: float = FIRST_BUCKET_MIB,
        overlap: bool = True,
        timeline: Timeline | None = None,
        tuner: BucketTuner | None = None,
        own_groups: Sequence[dist.ProcessGroup] = (),
        fixed_layout: Sequence[list[Tensor]] | None = None,
    ) -> None:
        self._names = {p: name for name, p in named_parameters}
        self.algorithm = algorithm
        self._own_groups = own_groups
        self._control_group = control_group
        self._tuner = tuner
        self._bucket_mib = tuner.first_mib if tuner else bucket_mib
        self._first_bucket_mib = first_bucket_mib
        self._overlap = overlap
        self.timeline = timeline or Timeline()
        self._sync = True
        self._in_pass = False
        self._pending: list[_Launched] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.buckets: list[Bucket] = []
        self._queue: list[Bucket] = []
        self._slots: dict[Tensor, _Slot] = {}
        self._aligned = fixed_layout is not None
        if fixed_layout is None:
            self._build()
        else:
            self._ready = {}
            self._lay_out(fixed_layout)
            self._order_is_known = True
        self.num_synchronized = 0
        """Passes whose gradients are final on all ranks."""

    # -- layout ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Buckets for all parameters that require gradients now, and those that ever did; their order is learnt."""
        self._ready: dict[Tensor, None] = {}
        chosen = [p for p in self._names if p.requires_grad or p in self._slots]
        self._lay_out(ddp_layout(chosen, max_bytes=sys.maxsize)[::-1])
        self._order_is_known = False

    def _build_in_order(self, order: Iterable[Tensor]) -> None:
        """Buckets for the same parameters in the order in which gradients become ready."""
        self._ready = dict.fromkeys(order)
        self._lay_out(layout_in_ready_order(self._ready, self._bucket_mib, self._first_bucket_mib))
        self._order_is_known = True

    def _lay_out(self, layout: Sequence[list[Tensor]]) -> None:
        dirty = {p for p, slot in self._slots.items() if slot.dirty}
        self._remove_hooks()
        self.algorithm.release([bucket.buffer() for bucket in self.buckets])
        self.buckets, self._slots, self._queue = [], {}, []  # before there are new ones: memory for one layout will do
        buffers = self.algorithm.allocate([BufferSpec.of(run, self._aligned) for run in layout])
        self.buckets = make_buckets(layout, buffers, aligned=self._aligned)
        self._slots = {
            p: _Slot(p, bucket, view, dirty=p in dirty)
            for bucket in self.buckets
            for p, view in zip(bucket.parameters(), bucket.views, strict=True)
        }
        self._handles = [_add_hook(p, partial(self._on_gradient, slot)) for p, slot in self._slots.items()]

    def _agreed_order(self) -> list[Tensor]:
        """Parameters in the order in which rank 0's gradients became ready in the last pass; blocks."""
        known = list(self._names)
        index = {p: i for i, p in enumerate(known)}
        order = torch.tensor([index[p] for p in self._ready])
        dist.broadcast(order, dist.get_global_rank(self._control_group, 0), group=self._control_group)
        return [known[i] for i in order.tolist()]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to round and compress as this one goes on to; ``algorithm`` is this rank's own."""
        order = [self._names[p] for p in self._ready] if self._order_is_known else []
        return {"order": order, "bucket_mib": self._bucket_mib, "algorithm": self.algorithm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, between two steps; called on all ranks.

        Raises:
            ValueError: it belongs to another model, or to buckets of another size.
        """
        parameters = {name: p for p, name in self._names.items() if p in self._slots}
        if state["order"] and set(state["order"]) != parameters.keys():
            raise ValueError("it belongs to a model with other trainable parameters")
        if self._tuner:  # it has been through
            self._bucket_mib, self._tuner = state["bucket_mib"], None
        if state["algorithm"] and state["bucket_mib"] != self._bucket_mib:
            raise ValueError(f"it belongs to buckets of {state['bucket_mib']:g} MiB, not {self._bucket_mib:g}")
        if state["order"]:
            self._build_in_order(parameters[name] for name in state["order"])
        self.algorithm.load_state_dict(state["algorithm"])

    def close(self) -> None:
        """Remove the hooks and release the algorithm, waiting for no peer. Gradients stay as they are."""
        self._remove_hooks()
        self.algorithm.close()
        # after a failed pass a collective may still wait for a peer, and destroying its group would wait with it
        for group in () if self._pending else self._own_groups:
            dist.destroy_process_group(group)
        _retired[:] = self._own_groups

    # -- collect ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        # every rank runs the same schedule, so all rebuild together
        if any(p.requires_grad and p not in self._slots for p in self._names):
            self._build()  # unfrozen since
        elif not self._order_is_known:
            if len(self._ready) == len(self._slots):
                self._build_in_order(self._agreed_order())
        elif self._tuner and (size_mib := self._tuner.step_begins()):
            self._bucket_mib = size_mib
            self._build_in_order(self._ready)
        self._missing = [0] * len(self.buckets)
        for slot in self._slots.values():
            slot.collected = False
            self._missing[slot.bucket.index()] += slot.parameter.requires_grad
        self._queue = [bucket for bucket in self.buckets if self._missing[bucket.index()]]
        self._clear_frozen()
        self._next = 0
        self._pending.clear()
        self._in_pass = True

    @torch.no_grad()
    def _clear_frozen(self) -> None:
        """A parameter that is frozen now shares its bucket with others: what it left there must not travel again."""
        for slot in self._slots.values():
            if not slot.parameter.requires_grad and self._missing[slot.bucket.index()]:
                if slot.parameter.grad is slot.view:
                    slot.parameter.grad = slot.view.clone()
                slot.view.zero_()

    def _on_gradient(self, slot: _Slot, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(
                f"parameter {self._names[parameter]!r} has a sparse gradient, which cannot be averaged here: "
                "use a dense layer (for embeddings: sparse=False) or --trainer.strategy ddp"
            )
        slot.dirty = True
        if not self._in_pass:
            return
        if not self._order_is_known:
            self._ready[parameter] = None
        if not self._overlap:
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
            torch.mul(gradient, self.algorithm.scale, out=slot.view)
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
        with self.timeline.tracer.range(self.algorithm.operation, bucket=bucket.index()):
            future = self.algorithm.start(bucket)
        # Nothing of the reducer in there: a thread of the backend runs it, and one that lets go of its own
        # process group last would wait for itself.
        ended: Future[int] = future.then(lambda done: time.perf_counter_ns())
        self._pending.append(_Launched(bucket, start_ns, future, ended))

    # -- finish ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.timeline.gradients_ready()
        mask = torch.tensor([slot.dirty for slot in self._slots.values()], dtype=torch.uint8)
        uses_any, control = bool(mask.any()), self._share_used(mask)
        if not uses_any:
            control.wait()
            if not mask.any():  # the pass was one of another model, on all ranks
                return
        for slot in self._slots.values():
            self._ready.setdefault(slot.parameter)
            if slot.parameter.requires_grad and not slot.collected:
                self._collect(slot)
        self._launch_ready()
        for launched in self._pending:
            self._await(launched)
        self._pending.clear()
        with self.timeline.tracer.part("wait for the used parameters"):
            control.wait()
        self._publish(mask)
        self.num_synchronized += 1
        self.timeline.synchronized()

    def _await(self, launched: _Launched) -> None:
        bucket, index = launched.bucket, launched.bucket.index()
        stand(bucket=f"{index + 1} of {len(self.buckets)}")
        with self.timeline.tracer.part("wait", bucket=index):
            bucket.take(launched.future.wait())
        num_bytes, end_ns = self.algorithm.num_bytes(bucket), launched.ended.wait()
        self.timeline.add_span(launched.start_ns, end_ns, num_bytes, self.algorithm.operation, bucket=index)

    def _share_used(self, mask: Tensor) -> dist.Work:
        """Start the control all-reduce of ``mask``, in place: 1 for every parameter that some rank used."""
        work = dist.all_reduce(mask, dist.ReduceOp.MAX, group=self._control_group, async_op=True)
        assert work is not None
        return work

    def _publish(self, used: Tensor) -> None:
        """Let ``p.grad`` be the averaged view; a parameter that no rank used keeps ``grad=None``."""
        for slot, was_used in zip(self._slots.values(), used.tolist(), strict=True):
            if was_used and slot.parameter.requires_grad:
                slot.parameter.grad = slot.view
            slot.dirty = False


def _add_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """To a parameter that may be frozen for this pass only (of a GAN, say): torch refuses hooks on frozen ones."""
    was_trained = parameter.requires_grad
    try:
        return parameter.requires_grad_().register_post_accumulate_grad_hook(hook)
    finally:
        parameter.requires_grad_(was_trained)
