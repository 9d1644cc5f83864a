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
from .peers import ExchangeFailed, Peers
from .protocol import Kind, Message, ProtocolError
from .server import ParameterServer, WorkerFailed

_NAMING_S = 3.0
"""How long to find out which worker has ended."""


@final
class SyncServer(ParameterServer):
    """Steps by the average of all workers' gradients, bucket by bucket as they become complete.

    Args:
        peers: Move gradients and parameters instead of the socket, if given.
        See :class:`.ParameterServer` for the others.
    """

    served: list[Aggregator]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *args: Any, peers: Peers | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers = peers
        self._pushed_at: dict[int, tuple[int, int]] = {}

    @override
    def _serve_optimizer(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None,
    ) -> Aggregator:
        are_scaled = allocate is not None and self._losses is None  # only the server knows how many are left
        return Aggregator(optimizer, parameters, self._num_workers, part_mib, allocate, self._wire_dtype, are_scaled)

    @override
    def _late_workers(self) -> set[int]:
        return set().union(*(served.missing_workers() for served in self.served if served.announced))

    @override
    def _check_turn(self, worker: int, message: Message) -> None:
        super()._check_turn(worker, message)
        if message.kind == Kind.STEP and (missing := self._growths.missing(worker, message.optimizer)):
            raise ProtocolError(
                f"worker {worker} steps without {missing[0]!r}, which another worker has unfrozen: unfreeze on all "
                "workers between the same two steps"
            )

    @override
    def _take_in(self, worker: int, message: Message, request: dict[str, Any]) -> None:
        if begun := self.served[message.optimizer].announced:
            raise ProtocolError(
                f"worker {worker} unfreezes parameters and worker(s) {', '.join(map(str, sorted(begun)))} did not: "
                "unfreeze on all workers between the same two steps"
            )
        super()._take_in(worker, message, request)
        self.served[message.optimizer].reset()

    @override
    def _step(self, worker: int, message: Message) -> None:
        aggregator = self.served[message.optimizer]
        aggregator.begin(worker, message.info)
        self._waiting_since = time.monotonic()
        now = time.perf_counter_ns()
        self._pushed_at[worker] = (now, now)
        if len(aggregator.announced) < len(aggregator.workers):
            return
        if self._peers is None:
            self._advance(message.optimizer, None)
        else:
            num_bytes = self._step_with(self._peers, aggregator)
            self.statistics.received_bytes += num_bytes // 2
            self.statistics.sent_bytes += num_bytes // 2
            self._finish_step(message.optimizer)

    def _step_with(self, peers: Peers, aggregator: Aggregator) -> int:
        try:
            return aggregator.step_with(peers, self._watch)
        except ExchangeFailed as error:
            deadline = time.monotonic() + _NAMING_S
            while time.monotonic() < deadline:  # the connection ends a moment before whoever watches can say whose
                self._watch()
                time.sleep(0.1)
            raise WorkerFailed(
                f"a worker left or stopped in the middle of a step ({error}); --trainer.strategy.step_timeout_s raises "
                "how long one may take"
            ) from error

    @override
    def _push(self, worker: int, message: Message) -> None:
        num_bytes = self._take_part(worker, message)
        self._pushed_at[worker] = (self._pushed_at[worker][0], time.perf_counter_ns())
        self.statistics.received_bytes += num_bytes
        self._advance(message.optimizer, message.bucket)

    def _advance(self, number: int, bucket_index: int | None) -> None:
        aggregator = self.served[number]
        for bucket, changed in aggregator.advance(bucket_index):
            if changed:
                self._send_values(number, bucket, sorted(aggregator.workers))
        if aggregator.finished:
            self._finish_step(number)

    @override
    def _go_on_without(self, worker: int) -> None:
        for number, aggregator in enumerate(self.served):
            aggregator.lose(worker)
            if aggregator.announced:
                self._advance(number, None)

    @override
    def _bye(self, worker: int, message: Message) -> None:
        super()._bye(worker, message)
        if self._losses is not None:  # one that is new in a lost one's place may stop by metrics of its own
            self._go_on_without(worker)

    @override
    def _go_on_with(self, worker: int) -> None:
        for aggregator in self.served:
            aggregator.take_in(worker)

    @override
    def _reply(self, worker: int, number: int, bucket_index: int, start: int, values: Tensor) -> Any:
        """Without a copy: workers push the next step only after they have received all of this one."""
        return None if self._memory is not None else tensor_bytes(values.cpu())

    def _finish_step(self, number: int) -> None:
        aggregator = self.served[number]
        pushed_at = {worker: self._pushed_at[worker] for worker in sorted(aggregator.workers)}
        receive_ms = {worker: (last - first) / 1e6 for worker, (first, last) in pushed_at.items()}
        times = {"reduce_ms": aggregator.reduce_ms, "optimizer_ms": aggregator.optimizer_ms}
        for worker, (first, _) in pushed_at.items():
            self._send(worker, Message(Kind.DONE, number, info={"receive_ms": receive_ms[worker], **times}))
            self.ledger.apply(worker)
            self.statistics.applied(worker)
            self.statistics.answered(worker, first)
        aggregator.reset()
        self._waiting_since = None
        self._count_step({"receive_ms": max(receive_ms.values()), **times})
