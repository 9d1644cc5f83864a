"""One optimizer on the server, with the parameters it steps: what every mode has in common. No sockets here."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buckets import Bucket, BufferSpec, make_buckets
from ..tracer import Tracer
from .layout import Layout
from .protocol import ProtocolError
from .wire import make_buffers


class ServedOptimizer(ABC):
    """Parameters in flat memory, from which replies go out, and the optimizer that steps them.

    Args:
        optimizer: Steps the server's parameters; they are moved into flat memory.
        parameters: Its parameters in order, as both sides know them.
        num_workers: How many push.
        part_mib: Size of a part in MiB.
        allocate: Makes the memory that workers read: where the parameters live, or, rounded, their copies.
        wire_dtype: See :class:`.Layout`.

    Attributes:
        sum_over_servers: Adds up a number over all servers of the run; blocks. For the norm of the whole gradient.
        tracer: Told what is done when; the server sets it.
    """

    sum_over_servers: Callable[[float], float] | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        num_workers: int,
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.layout = Layout(parameters, part_mib, wire_dtype=wire_dtype)
        self._num_workers = num_workers
        self._shared: dict[int, list[Bucket]] = {}
        self.tracer = Tracer()
        self._known: dict[int, int] = {}
        self._extents = [(len(optimizer.param_groups), len(self.layout.buckets))]
        """How many parameter groups and buckets there were at the start, and after each growth."""
        self.reduce_ms = 0.0
        self.optimizer_ms = 0.0
        self._replies: list[Tensor] = []
        """Per bucket, the parameters as they travel."""
        self._values: list[Bucket] = []
        self._hold(allocate)

    @torch.no_grad()
    def _hold(self, allocate: Callable[[list[BufferSpec]], list[Tensor]] | None) -> list[Bucket]:
        """Move the parameters of buckets that are new in the layout into flat memory; returns those."""
        first = len(self._values)
        buckets = self.layout.buckets[first:]
        self._replies += (allocate or make_buffers)(self.layout.specs[first:])
        pairs = zip(buckets, self._replies[first:], strict=True)
        held = [torch.zeros_like(b.buffer()) if self.layout.is_narrowed(b) else reply for b, reply in pairs]
        new = make_buckets([bucket.parameters() for bucket in buckets], held, first)
        for bucket in new:
            for parameter, view in zip(bucket.parameters(), bucket.views, strict=True):
                parameter.data = view.copy_(parameter)
        self._values += new
        return new

    def attach(self, worker: int, buffers: list[Tensor], first: int = 0) -> None:
        """``worker`` writes its gradients to ``buffers``, one per bucket from ``first``: until it is answered."""
        own = self._shared.setdefault(worker, [])
        runs = [bucket.parameters() for bucket in self.layout.buckets[first : first + len(buffers)]]
        own += make_buckets(runs, buffers, first)

    def detach(self, worker: int) -> None:
        """``worker`` is lost: forget its memory, and what it knew of."""
        self._shared.pop(worker, None)
        self._known.pop(worker, None)

    # -- phase: grow -----------------------------------------------------------------------------------------

    def grow(
        self,
        parameters: list[Tensor],
        groups: list[dict[str, Any]],
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None,
    ) -> list[Bucket]:
        """Take in trainable ``parameters`` and parameter groups; returns the buckets that hold the values."""
        for group in groups:
            self.optimizer.add_param_group(group)
        self.layout.extend(parameters)
        new = self._hold(allocate)
        self._extents.append((len(self.optimizer.param_groups), len(self.layout.buckets)))
        return new

    def know(self, worker: int, num_growths: int) -> int:
        """``worker`` knows of so many growths from now on; returns where the buckets of the last one begin."""
        self._known[worker] = num_growths
        return self._extents[num_growths - 1][1]

    def buckets_of(self, worker: int) -> list[Bucket]:
        """The buckets that ``worker`` knows of."""
        return self.layout.buckets[: self._extents[self._known.get(worker, 0)][1]]

    def groups_of(self, worker: int) -> list[dict[str, Any]]:
        """The parameter groups that ``worker`` knows of."""
        return self.optimizer.param_groups[: self._extents[self._known.get(worker, 0)][0]]

    def state_dict_of(self, worker: int) -> dict[str, Any]:
        """The optimizer's, without groups that ``worker`` does not know of."""
        state, num_groups = self.optimizer.state_dict(), len(self.groups_of(worker))
        groups = state["param_groups"][:num_groups]
        indices = {index for group in groups for index in group["params"]}
        return {"state": {k: v for k, v in state["state"].items() if k in indices}, "param_groups": groups}

    def values(self, bucket: Bucket, start: int, end: int) -> Tensor:
        """The current parameters of part ``[start, end)`` of ``bucket``; shares the server's memory."""
        return self._values[bucket.index()].buffer()[start:end]

    def reply(self, bucket: Bucket, start: int, end: int) -> Tensor:
        """The same as they travel, valid until the next call for this part."""
        values, reply = self.values(bucket, start, end), self._replies[bucket.index()][start:end]
        return reply.copy_(values) if self.layout.is_narrowed(bucket) else values

    def part(self, bucket_index: int, part: int, payload: Any, exact: bool = False) -> Tensor:
        """The parameters that ``payload`` is for.

        Args:
            exact: Whether it has them in the dtype that they are held in.

        Raises:
            ProtocolError: there is no such part, or it has another size.
        """
        if bucket_index < len(self.layout.buckets):
            bucket = self.layout.buckets[bucket_index]
            parts = self.layout.parts(bucket)
            dtype = bucket.buffer().dtype if exact else self.layout.specs[bucket_index].dtype
            if part < len(parts) and len(payload) == (parts[part][1] - parts[part][0]) * dtype.itemsize:
                return self.values(bucket, *parts[part])
        raise ProtocolError(f"{len(payload)} bytes came for bucket {bucket_index} part {part}: no such part or size")

    @abstractmethod
    def begin(self, worker: int, info: Any) -> None:
        """Worker ``worker`` announces a push: ``used`` (per bucket, per parameter), ``groups``, ``clip``.

        Raises:
            ProtocolError: it does not fit, or is out of turn; so does :meth:`add`.
        """

    @abstractmethod
    def add(self, worker: int, bucket_index: int, part: int, payload: Any) -> None:
        """Keep one part of it; ``payload`` is bytes-like and not copied."""

    def _check_used(self, worker: int, used: list[list[bool]]) -> None:
        if [len(flags) for flags in used] != [len(b.parameters()) for b in self.buckets_of(worker)]:
            raise ProtocolError(f"worker {worker} describes other buckets than the server has")

    def _take_settings(self, groups: list[dict[str, Any]]) -> None:
        """The parameter groups' settings (learning rates), as they came as JSON."""
        for group, settings in zip(self.optimizer.param_groups, groups, strict=False):  # a worker may know of fewer
            update_group(group, settings)

    @staticmethod
    def _set_gradients(bucket: Bucket, gradients: Iterable[Tensor], flags: Iterable[bool]) -> None:
        """A parameter that no worker used keeps ``grad=None``, or momentum and decay would move it."""
        for parameter, gradient, used in zip(bucket.parameters(), gradients, flags, strict=True):
            parameter.grad = gradient if used else None

    def _step(self, clip: dict[str, Any], **of: int) -> None:
        """Clip and step whatever has a gradient: ``of`` which bucket or worker, for traces."""
        start_ns = time.perf_counter_ns()
        with self.tracer.part("optimizer", **of):
            self._clip_and_step(clip)
        self.optimizer_ms += (time.perf_counter_ns() - start_ns) / 1e6

    def _clip_and_step(self, clip: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if clip["algorithm"] == "norm":
            self._clip_norm(parameters, clip["value"])
        elif clip["algorithm"] == "value":
            torch.nn.utils.clip_grad_value_(parameters, clip["value"])
        if parameters:
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def _clip_norm(self, parameters: list[Tensor], max_norm: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.sum_over_servers is not None:
            norm = torch.tensor(self.sum_over_servers(norm.double().item() ** 2)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def update_group(group: dict[str, Any], settings: dict[str, Any]) -> None:
    """Take over settings, keeping the types that the optimizer had."""
    for key in settings.keys() & group.keys():
        value = settings[key]
        if isinstance(group[key], Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
