"""The parameter server: one thread that receives gradients, steps the optimizers and answers with parameters.

Here is what all modes share; :mod:`.sync_server` and :mod:`.async_server` say when a push becomes a step.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
from torch import Tensor
from torch.optim import Optimizer

from ..buckets import Bucket, BufferSpec
from ..packing import MalformedTree, pack_tree, tensor_bytes, tensor_from, unpack_tree
from ..tracer import Tracer
from .checks import check_fields, check_settings
from .protocol import Kind, Message, ProtocolError, first_difference, table_of
from .served import ServedOptimizer
from .shared_buckets import SharedBuffers, attach

_POLL_MS = 200


class WorkerFailed(Exception):
    """A worker reported an error, left or stayed silent; the message names it and gives its error."""


@dataclass
class ServerStatistics:
    """What the server did since :meth:`take`; times in milliseconds."""

    num_steps: int = 0
    num_bytes: int = 0
    receive_ms: float = 0.0
    reduce_ms: float = 0.0
    optimizer_ms: float = 0.0
    total_steps: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    """How many steps were taken with gradients that so many other steps had overtaken."""
    since: float = field(default_factory=time.perf_counter)

    def take(self) -> dict[str, float]:
        """Means per step since the last call, and steps per second; starts a new interval."""
        now = time.perf_counter()
        steps = max(1, self.num_steps)
        means: dict[str, float] = {
            name: getattr(self, name) / steps for name in ("num_bytes", "receive_ms", "reduce_ms", "optimizer_ms")
        }
        means["steps_per_s"] = self.num_steps / max(1e-9, now - self.since)
        means["total_steps"] = self.total_steps
        means["staleness"] = sum(k * n for k, n in self.staleness.items()) / steps
        means["max_staleness"] = max(self.staleness, default=0)
        self.num_steps, self.num_bytes, self.since = 0, 0, now
        self.receive_ms = self.reduce_ms = self.optimizer_ms = 0.0
        self.staleness.clear()
        return means


class ParameterServer(ABC):
    """Serves one fit to ``num_workers`` workers over a bound ROUTER socket; see :mod:`.protocol` for the phases.

    Args:
        socket: Bound; workers' routing ids are their ranks as ASCII digits. The caller closes it.
        optimizers: With the parameters to serve, in the same order as on the workers; may be empty (validation).
        named_parameters: Per optimizer, its parameters with their names.
        num_workers: All of them must say hello.
        timeout_s: Seconds to wait for a worker that others wait for.
        part_mib: Size of a part in MiB, as the workers'.
        watch: Called a few times per second; raises if a worker process is known to have ended.
        on_step: Called after every step with the statistics.
        shared: Tensors go through memory shared with the workers, which are on this host.

    Raises:
        SharedMemoryError: there is too little memory for that.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        optimizers: list[Optimizer],
        named_parameters: list[list[tuple[str, Tensor]]],
        num_workers: int,
        timeout_s: float,
        part_mib: float,
        watch: Callable[[], None],
        on_step: Callable[[ServerStatistics], None],
        shared: bool = False,
    ) -> None:
        self._socket = socket
        self._tables = [table_of(named) for named in named_parameters]
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._watch = watch
        self._on_step = on_step
        self._shared = [SharedBuffers(num_workers + 1) for _ in optimizers] if shared else None
        allocators = [s.allocate for s in self._shared] if self._shared else [None] * len(optimizers)
        self.served: list[ServedOptimizer] = [
            self._serve_optimizer(optimizer, [p for _, p in named], part_mib, allocate)
            for optimizer, named, allocate in zip(optimizers, named_parameters, allocators, strict=True)
        ]
        self._pushed: dict[int, list[list[Tensor]]] = {}
        """Per worker and optimizer, the shared buffers to which it writes its gradients."""
        self._init_parts = {
            (number, bucket.index(), part)
            for number, served in enumerate(self.served)
            for bucket, part, _, _ in served.layout.all_parts()
        }
        """What is missing of the values to start from."""
        self._ids = {str(worker).encode(): worker for worker in range(num_workers)}
        self._has_begun = False
        """Everybody was welcomed."""
        self._greeted: set[int] = set()
        self._left: dict[int, Any] = {}
        self._waiting_since: float | None = time.monotonic()
        self.statistics = ServerStatistics()
        self.trace(Tracer())

    def trace(self, tracer: Tracer) -> None:
        """Let ``tracer`` know what is done when; before :meth:`serve`."""
        self.tracer = tracer
        for served in self.served:
            served.tracer = tracer

    # -- what a mode decides ---------------------------------------------------------------------------------

    @abstractmethod
    def _serve_optimizer(
        self,
        optimizer: Optimizer,
        parameters: list[Tensor],
        part_mib: float,
        allocate: Callable[[list[BufferSpec]], list[Tensor]] | None,
    ) -> ServedOptimizer:
        """What holds the gradients for ``optimizer`` until it steps."""

    @abstractmethod
    def _step(self, worker: int, message: Message) -> None:
        """A worker announces a push."""

    @abstractmethod
    def _push(self, worker: int, message: Message) -> None:
        """A part of it has come."""

    @abstractmethod
    def _late_workers(self) -> set[int]:
        """For whom the others wait since ``_waiting_since``."""

    def serve(self) -> tuple[Any, Any]:
        """Block until every worker has said bye; return worker 0's farewell: ``(info, unpacked tree)``.

        Raises:
            WorkerFailed: naming the worker; the others have been told and their sockets may be closed.
        """
        try:
            while len(self._left) < self._num_workers:
                if self._socket.poll(_POLL_MS):
                    self._receive()
                else:
                    self._watch()
                    self._check_patience()
        except Exception as error:
            self._tell_all(Message(Kind.FAIL, info={"error": str(error) or repr(error)}))
            raise
        return self._left[0]

    # -- messages --------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        frames = self._socket.recv_multipart(copy=False)
        if frames[0].bytes not in self._ids:
            raise ProtocolError(f"worker {frames[0].bytes!r} is not one of the {self._num_workers} expected")
        worker = self._ids[frames[0].bytes]
        message = Message.parse([frame.buffer for frame in frames[1:]])
        if message.kind not in _HANDLERS:
            raise ProtocolError(f"worker {worker} sends {message.kind.name}, which only the server may")
        check_fields(worker, message)
        self._check_turn(worker, message)
        if message.kind == Kind.STEP:
            check_settings(worker, message.info["groups"], self.served[message.optimizer].optimizer)
            if message.info.get("recorded") is True:
                self.tracer.requested(worker)
        _HANDLERS[message.kind](self, worker, message)

    def _check_turn(self, worker: int, message: Message) -> None:
        """Phases follow each other, and a worker may only name what exists."""
        kind = message.kind
        if kind in _OF_AN_OPTIMIZER and message.optimizer >= len(self.served):
            raise ProtocolError(f"worker {worker} names optimizer {message.optimizer}, which does not exist")
        if kind == Kind.FAIL:
            return
        if (worker in self._greeted) == (kind == Kind.HELLO):
            when = "twice" if kind == Kind.HELLO else "before it said hello"
            raise ProtocolError(f"worker {worker} sends {kind.name} {when}")
        if worker in self._left:
            raise ProtocolError(f"worker {worker} sends {kind.name} after it has left")
        if kind != Kind.HELLO and self._has_begun == (kind == Kind.INIT):
            when = "after" if self._has_begun else "before"
            raise ProtocolError(f"worker {worker} sends {kind.name} {when} the workers were welcomed")

    def _send(self, worker: int, message: Message) -> None:
        self._socket.send_multipart([str(worker).encode(), *message.frames()], copy=False)
        if message.kind == Kind.DONE:
            self.tracer.answered(worker)

    def _tell_all(self, message: Message) -> None:
        for worker in self._greeted - self._left.keys():
            try:
                self._send(worker, message)
            except zmq.ZMQError:
                continue  # it is gone, which may be the very reason

    def _check_patience(self) -> None:
        """Name who keeps the others waiting."""
        if self._waiting_since is None or time.monotonic() - self._waiting_since < self._timeout_s:
            return
        missing, what = set(range(self._num_workers)) - self._greeted, "did not say hello"
        if not missing:
            missing = self._late_workers()
            what = "did not push the step that the others wait for"
        raise WorkerFailed(
            f"worker(s) {', '.join(map(str, sorted(missing)))} {what} within {self._timeout_s:g} s; "
            "--trainer.strategy.step_timeout_s raises the limit"
        )

    # -- phase: hello and init -------------------------------------------------------------------------------

    def _hello(self, worker: int, message: Message) -> None:
        difference = next(
            (d for mine, theirs in zip(self._tables, message.info["tables"], strict=False)
             if (d := first_difference(mine, theirs))),
            None,
        )  # fmt: skip
        if difference is None and len(self._tables) != len(message.info["tables"]):
            difference = f"server has {len(self._tables)} optimizers, worker {len(message.info['tables'])}"
        self._greeted.add(worker)
        if difference is not None:
            raise WorkerFailed(f"worker {worker} trains another model than the server: {difference}")
        if self._shared:
            self._take_memory(worker, message.info["memory"] or {})
        self._welcome()

    def _init(self, worker: int, message: Message) -> None:
        if worker != 0:
            raise ProtocolError(f"worker {worker} sends initial values, which only worker 0 may")
        payload = self._payload(worker, message)
        target = self.served[message.optimizer].part(message.bucket, message.part, payload)
        with torch.no_grad():
            target.copy_(tensor_from(payload, target.dtype))
        self._init_parts.discard((message.optimizer, message.bucket, message.part))
        self._welcome()

    def _welcome(self) -> None:
        """All have greeted and the values to start from are here: let everybody begin."""
        if len(self._greeted) == self._num_workers and not self._init_parts:
            self._waiting_since = None
            self._has_begun = True
            memory = [shared.handle() for shared in self._shared] if self._shared else None
            self._tell_all(Message(Kind.WELCOME, info=memory))

    def _take_memory(self, worker: int, memory: dict[str, Any]) -> None:
        """A worker tells where its memory is."""
        self._pushed[worker] = self._attach(memory.get("pushed", []))
        for served, buffers in zip(self.served, self._pushed[worker], strict=True):
            served.attach(worker, buffers)

    def _attach(self, handles: list[dict[str, Any]]) -> list[list[Tensor]]:
        """A worker's buffers, per optimizer."""
        try:
            return [attach(h, served.layout.specs) for h, served in zip(handles, self.served, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a worker describes memory that cannot be mapped: {error!r}") from error

    def _payload(self, worker: int, message: Message) -> Any:
        """The bytes that came with a message, or that it says are in the worker's shared memory."""
        if not self._shared:
            return message.payload
        layout = self.served[message.optimizer].layout
        try:
            start, end = layout.parts(layout.buckets[message.bucket])[message.part]
        except IndexError:
            raise ProtocolError(f"worker {worker} names bucket {message.bucket} part {message.part}: no such") from None
        return tensor_bytes(self._pushed[worker][message.optimizer][message.bucket][start:end])

    def _count_step(self, times: dict[str, float], staleness: int = 0) -> None:
        stats = self.statistics
        stats.num_steps += 1
        stats.total_steps += 1
        stats.receive_ms += times["receive_ms"]
        stats.reduce_ms += times["reduce_ms"]
        stats.optimizer_ms += times["optimizer_ms"]
        stats.staleness[staleness] += 1
        self._on_step(stats)

    # -- values ----------------------------------------------------------------------------------------------

    def _fetch(self, worker: int, message: Message) -> None:
        for bucket in self.served[message.optimizer].layout.buckets:
            self._send_values(message.optimizer, bucket, [worker])
        self._send(worker, Message(Kind.DONE, message.optimizer, info={}))

    def _take_part(self, worker: int, message: Message) -> int:
        """Keep a part of a push; returns its bytes."""
        with self.tracer.part("receive", bucket=message.bucket, part=message.part, worker=worker):
            payload = self._payload(worker, message)
            self.served[message.optimizer].add(worker, message.bucket, message.part, payload)
        return len(payload)

    def _send_values(self, number: int, bucket: Bucket, workers: Iterable[int]) -> None:
        """The bucket's current parameters, to ``workers``."""
        with self.tracer.part("send", bucket=bucket.index(), workers=list(workers)):
            self._send_parts(number, bucket, workers)

    def _send_parts(self, number: int, bucket: Bucket, workers: Iterable[int]) -> None:
        served = self.served[number]
        for part, (start, end) in enumerate(served.layout.parts(bucket)):
            values = served.values(bucket, start, end)
            for worker in workers:
                payload = self._reply(worker, number, bucket.index(), start, values)
                self._send(worker, Message(Kind.PULL, number, bucket.index(), part, payload=payload))
                self.statistics.num_bytes += values.nbytes

    @abstractmethod
    def _reply(self, worker: int, number: int, bucket_index: int, start: int, values: Tensor) -> Any:
        """The bytes of ``values`` for a message; None once they are in shared memory where the worker reads them."""

    # -- optimizer state -------------------------------------------------------------------------------------

    def _get_state(self, worker: int, message: Message) -> None:
        info, payload = pack_tree(self.served[message.optimizer].optimizer.state_dict())
        self._send(worker, Message(Kind.STATE, message.optimizer, info=info, payload=payload))

    def _set_state(self, worker: int, message: Message) -> None:
        state = _unpack(worker, message.info, message.payload)
        optimizer = self.served[message.optimizer].optimizer
        own = optimizer.state_dict()["param_groups"]  # of several servers each has other parameters in the groups
        try:
            pairs = zip(state["param_groups"], own, strict=True)
            groups = [{**group, **saved, "params": group["params"]} for saved, group in pairs]
            optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"worker {worker} sends a state that the optimizer cannot load: {error!r}") from error
        self._send(worker, Message(Kind.STATE, message.optimizer))

    # -- phase: bye ------------------------------------------------------------------------------------------

    def _bye(self, worker: int, message: Message) -> None:
        self._left[worker] = (message.info["info"], _unpack(worker, message.info["tree"], message.payload))

    def _fail(self, worker: int, message: Message) -> None:
        self._left[worker] = None
        raise WorkerFailed(f"worker {worker} failed: {message.info['error']}")

    def release(self) -> None:
        """Give every parameter memory of its own again, for whoever uses the model after the run."""
        for aggregator in self.served:
            for group in aggregator.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data = parameter.data.clone()
        for shared in self._shared or []:
            shared.seal()


def _unpack(worker: int, description: Any, payload: Any) -> Any:
    try:
        return unpack_tree(description, payload)
    except (MalformedTree, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ProtocolError(f"worker {worker} sends a tree that cannot be unpacked: {error!r}") from error


_OF_AN_OPTIMIZER = {Kind.INIT, Kind.STEP, Kind.PUSH, Kind.FETCH, Kind.GET_STATE, Kind.SET_STATE}

_HANDLERS: dict[Kind, Callable[[ParameterServer, int, Message], None]] = {
    Kind.HELLO: ParameterServer._hello,
    Kind.INIT: ParameterServer._init,
    Kind.STEP: lambda server, worker, message: server._step(worker, message),
    Kind.PUSH: lambda server, worker, message: server._push(worker, message),
    Kind.FETCH: ParameterServer._fetch,
    Kind.GET_STATE: ParameterServer._get_state,
    Kind.SET_STATE: ParameterServer._set_state,
    Kind.BYE: lambda server, worker, message: server._bye(worker, message),
    Kind.FAIL: ParameterServer._fail,
}
