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


class ServedOptimizer(ABC):
    """Parameters in flat memory, from which replies go out, and the optimizer that steps them.

    Args:
        optimizer: Steps the server's parameters; they are moved into flat memory.
        parameters: Its parameters in order, as both sides know them.
        num_workers: How many push.
        part_mib: Size of a part in MiB.
        allocate: Makes the memory that the parameters move to.

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
    ) -> None:
        self.optimizer = optimizer
        self.layout = Layout(parameters, part_mib)
        self._values = Layout(parameters, part_mib, allocate)
        self._num_workers = num_workers
        self._shared: dict[int, list[Bucket]] = {}
        self.tracer = Tracer()
        self.reduce_ms = 0.0
        self.optimizer_ms = 0.0
        with torch.no_grad():
            for bucket in self._values.buckets:
                for parameter, view in zip(bucket.parameters(), bucket.views, strict=True):
                    parameter.data = view.copy_(parameter)

    def attach(self, worker: int, buffers: list[Tensor]) -> None:
        """``worker`` writes its gradients to ``buffers``, one per bucket: its gradients until it is answered."""
        self._shared[worker] = make_buckets([bucket.parameters() for bucket in self.layout.buckets], buffers)

    def values(self, bucket: Bucket, start: int, end: int) -> Tensor:
        """The current parameters of part ``[start, end)`` of ``bucket``; shares the server's memory."""
        return self._values.buckets[bucket.index()].buffer()[start:end]

    def part(self, bucket_index: int, part: int, payload: Any) -> Tensor:
        """The parameters that ``payload`` is for.

        Raises:
            ProtocolError: there is no such part, or it has another size.
        """
        if bucket_index < len(self.layout.buckets):
            bucket = self.layout.buckets[bucket_index]
            parts = self.layout.parts(bucket)
            if part < len(parts) and len(payload) == (target := self.values(bucket, *parts[part])).nbytes:
                return target
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
        if [len(flags) for flags in used] != [len(b.parameters()) for b in self.layout.buckets]:
            raise ProtocolError(f"worker {worker} describes other buckets than the server has")

    def _take_settings(self, groups: list[dict[str, Any]]) -> None:
        """The parameter groups' settings (learning rates), as they came as JSON."""
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            _update_group(group, settings)

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


def _update_group(group: dict[str, Any], settings: dict[str, Any]) -> None:
    """Take over settings, keeping the types that the optimizer had."""
    for key in settings.keys() & group.keys():
        value = settings[key]
        if isinstance(group[key], Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
