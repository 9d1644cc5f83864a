"""Async and bounded mode: every push is a step on arrival, and nobody waits for its peers (or only so long).

Source of the bound: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server"
(NIPS 2013). Steps of one server are taken one after the other, each as a whole, so that every reply is the state
after a whole number of steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..buckets import BufferSpec
from ..packing import tensor_bytes
from .applier import Applier
from .protocol import Kind, Message, ProtocolError
from .server import ParameterServer
from .worker_memory import attach_all, attach_one


@final
class AsyncServer(ParameterServer):
    """Steps by one worker's gradients at a time.

    A *clock* counts a worker's applied pushes. With ``staleness`` s a worker whose clock is more than s ahead of the
    slowest one's gets its reply only when that has caught up, so that nobody begins a step more than s ahead.

    Args:
        staleness: The bound s >= 1; None for none.
        corrects_staleness: Divide a push's learning rate by 1 + the number of steps that others took since the worker
            got its parameters (Zhang et al., "Staleness-aware Async-SGD", IJCAI 2016).
        schedule: Apply pushes in this order of workers, whatever the order of arrival; then as they come.
        on_apply: Called with the worker of every push that was applied, in order.
        See :class:`.ParameterServer` for the others.
    """

    served: list[Applier]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        *args: Any,
        staleness: int | None = None,
        corrects_staleness: bool = False,
        schedule: Iterable[int] = (),
        on_apply: Callable[[int], None] = lambda worker: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._staleness = staleness
        self._corrects_staleness = corrects_staleness
        self._schedule = deque(schedule)
        self._on_apply = on_apply
        workers = range(self._num_workers)
        self.clocks = dict.fromkeys(workers, 0)
        self._versions = {worker: [0] * len(self.served) for worker in workers}
        """Of the parameters that a worker has, per optimizer."""
        self._began_ns = dict.fromkeys(workers, 0)
        self._ready: dict[int, int] = {}
        """Worker and optimizer of the pushes that are complete, in the order of arrival."""
        self._parked: dict[int, tuple[int, dict[str, Any]]] = {}
        """Worker, optimizer and times of the pushes that are applied and not answered yet."""
        self._inboxes: dict[int, list[list[Tensor]]] = {}

    @override
    def _serve_optimizer(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None,
    ) -> Applier:
        return Applier(optimizer, parameters, self._num_workers, part_mib, allocate, self._wire_dtype)

    @override
    def _take_memory(self, worker: int, memory: dict[str, Any]) -> None:
        super()._take_memory(worker, memory)
        self._inboxes[worker] = attach_all(memory.get("inbox", []), self.served)

    @override
    def _take_grown_memory(
        self, worker: int, number: int, first: int, specs: list[BufferSpec], memory: dict[str, Any]
    ) -> None:
        super()._take_grown_memory(worker, number, first, specs, memory)
        self._inboxes[worker][number] += attach_one(memory.get("inbox"), specs)

    @override
    def _grow(self, worker: int, message: Message) -> None:
        if self._is_busy(worker):
            raise ProtocolError(f"worker {worker} unfreezes parameters within a step")
        super()._grow(worker, message)

    # -- phase: step -----------------------------------------------------------------------------------------

    @override
    def _step(self, worker: int, message: Message) -> None:
        if message.info["sequence"] != self.clocks[worker] + 1 or self._is_busy(worker):
            raise ProtocolError(
                f"worker {worker} announced its step {message.info['sequence']}, but {self.clocks[worker]} were applied"
            )
        self._began_ns[worker] = time.perf_counter_ns()
        self.served[message.optimizer].begin(worker, message.info)
        self._apply_if_complete(worker, message.optimizer)

    def _is_busy(self, worker: int) -> bool:
        """A push of this worker is under way, of whichever optimizer."""
        return worker in self._parked or any(served.expects(worker) for served in self.served)

    @override
    def _push(self, worker: int, message: Message) -> None:
        self.statistics.received_bytes += self._take_part(worker, message)
        self._apply_if_complete(worker, message.optimizer)

    def _apply_if_complete(self, worker: int, number: int) -> None:
        if self.served[number].is_complete(worker):
            self._ready[worker] = number
        while (chosen := self._next_worker()) is not None:
            self._apply(chosen, self._ready.pop(chosen))

    def _next_worker(self) -> int | None:
        """Whose push is applied next, None if that has to wait."""
        if not self._schedule:
            return next(iter(self._ready), None)
        return self._schedule.popleft() if self._schedule[0] in self._ready else None

    def _apply(self, worker: int, number: int) -> None:
        applier = self.served[number]
        staleness = applier.version - self._versions[worker][number]
        receive_ms = (time.perf_counter_ns() - self._began_ns[worker]) / 1e6
        applier.apply(worker, 1.0 / (1 + staleness) if self._corrects_staleness else 1.0)
        self.clocks[worker] += 1
        self.ledger.apply(worker)
        self._on_apply(worker)
        self.statistics.applied(worker, staleness)
        times = {"reduce_ms": applier.reduce_ms, "optimizer_ms": applier.optimizer_ms}
        self._parked[worker] = (number, {"receive_ms": receive_ms, "staleness": staleness, **times})
        self._release()
        self._count_step({"receive_ms": receive_ms, **times})

    def _release(self) -> None:
        """Answer everybody who may go on."""
        slowest = min((self.clocks[worker] for worker in self._present()), default=0)
        for worker, (number, times) in list(self._parked.items()):
            if self._staleness is None or self.clocks[worker] - slowest <= self._staleness:
                del self._parked[worker]
                self._answer(worker, number, times)
        self._waiting_since = time.monotonic() if self._parked else None

    def _answer(self, worker: int, number: int, times: dict[str, Any]) -> None:
        for bucket in self.served[number].buckets_of(worker):  # others may have changed all of them
            self._send_values(number, bucket, [worker])
        self._versions[worker][number] = self.served[number].version
        self._send(worker, Message(Kind.DONE, number, info={**times, "version": sum(self.clocks.values())}))
        self.statistics.answered(worker, self._began_ns[worker])

    @override
    def _reply(self, worker: int, number: int, bucket_index: int, start: int, values: Tensor) -> Any:
        """A copy: the next step may come before the worker has read it."""
        if self._memory is None:
            return bytes(tensor_bytes(values.cpu()))
        self._inboxes[worker][number][bucket_index][start : start + len(values)].copy_(values)
        return None

    @override
    def _late_workers(self) -> set[int]:
        present = {worker: self.clocks[worker] for worker in self._present()}
        return {worker for worker, clock in present.items() if clock == min(present.values())}

    @override
    def _go_on_with(self, worker: int) -> None:
        """It begins where the slowest is, so that no bound holds anybody back for what it has missed."""
        slowest = min(self.clocks[other] for other in self._present() - {worker})
        self.clocks[worker] = max(self.clocks[worker], slowest)
        self._versions[worker] = [served.version for served in self.served]

    @override
    def _steps_of(self, worker: int) -> int:
        return self.clocks[worker]

    @override
    def _go_on_without(self, worker: int) -> None:
        self._ready.pop(worker, None)
        self._parked.pop(worker, None)
        for served in self.served:
            served.forget(worker)
        self._release()

    @override
    def _bye(self, worker: int, message: Message) -> None:
        super()._bye(worker, message)
        self._release()
