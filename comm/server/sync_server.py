"""Sync mode: all workers take part in every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..buckets import BufferSpec
from ..packing import tensor_bytes
from .aggregator import Aggregator
from .naive import NaivePeers
from .protocol import Kind, Message
from .server import ParameterServer


@final
class SyncServer(ParameterServer):
    """Steps by the average of all workers' gradients, bucket by bucket as they become complete.

    Args:
        naive: Moves gradients and parameters instead of the socket, if given.
        See :class:`.ParameterServer` for the others.
    """

    served: list[Aggregator]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *args: Any, naive: NaivePeers | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._naive = naive
        self._pushed_at: dict[int, tuple[int, int]] = {}

    @override
    def _serve_optimizer(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None,
    ) -> Aggregator:
        return Aggregator(optimizer, parameters, self._num_workers, part_mib, allocate, are_scaled=allocate is not None)

    @override
    def _late_workers(self) -> set[int]:
        return set().union(*(served.missing_workers() for served in self.served if served.announced))

    @override
    def _step(self, worker: int, message: Message) -> None:
        aggregator = self.served[message.optimizer]
        aggregator.begin(worker, message.info)
        self._waiting_since = time.monotonic()
        now = time.perf_counter_ns()
        self._pushed_at[worker] = (now, now)
        if len(aggregator.announced) < self._num_workers:
            return
        if self._naive is None:
            self._advance(message.optimizer, None)
        else:
            self.statistics.num_bytes += aggregator.step_naively(self._naive)
            self._finish_step(message.optimizer)

    @override
    def _push(self, worker: int, message: Message) -> None:
        num_bytes = self._take_part(worker, message)
        self._pushed_at[worker] = (self._pushed_at[worker][0], time.perf_counter_ns())
        self.statistics.num_bytes += num_bytes
        self._advance(message.optimizer, message.bucket)

    def _advance(self, number: int, bucket_index: int | None) -> None:
        aggregator = self.served[number]
        for bucket, changed in aggregator.advance(bucket_index):
            if changed:
                self._send_values(number, bucket, range(self._num_workers))
        if aggregator.finished:
            self._finish_step(number)

    @override
    def _reply(self, worker: int, number: int, bucket_index: int, start: int, values: Tensor) -> Any:
        """Without a copy: workers push the next step only after they have received all of this one."""
        return None if self._shared else tensor_bytes(values.cpu())

    def _finish_step(self, number: int) -> None:
        aggregator = self.served[number]
        receive_ms = {w: (last - first) / 1e6 for w, (first, last) in self._pushed_at.items()}
        times = {"reduce_ms": aggregator.reduce_ms, "optimizer_ms": aggregator.optimizer_ms}
        for worker in range(self._num_workers):
            self._send(worker, Message(Kind.DONE, number, info={"receive_ms": receive_ms[worker], **times}))
        aggregator.reset()
        self._waiting_since = None
        self._count_step({"receive_ms": max(receive_ms.values()), **times})
