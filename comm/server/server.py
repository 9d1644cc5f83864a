"""The parameter server: one thread that receives gradients, steps the optimizers and answers with parameters.

Here is what all modes share; :mod:`.sync_server` and :mod:`.async_server` say when a push becomes a step.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import zmq
from torch import Tensor
from torch.optim import Optimizer

from ..buckets import Bucket, BufferSpec
from ..packing import MalformedTree, pack_tree, tensor_bytes, tensor_from, unpack_tree
from ..tracer import Tracer
from .checks import check_fields, check_settings
from .growth import Growths
from .ledger import Ledger, LossWatch, identity
from .links import RouterLink
from .protocol import Kind, Message, ProtocolError, first_difference, table_of
from .served import ServedOptimizer
from .shared_buckets import SharedBuffers
from .statistics import ServerStatistics
from .wire import check_parameters
from .worker_memory import WorkerMemory

_POLL_MS = 200
_LOOK_S = 0.25
"""How often to look whether a worker is lost, whatever else there is to do."""


class WorkerFailed(Exception):
    """A worker reported an error, left or stayed silent; the message names it and gives its error."""


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
        wire_dtype: In which gradients and parameters travel, as the workers'; see :class:`.Layout`.
        by_name: Parameters of the module that may join an optimizer in mid-run.
        losses: Finds lost workers, without which the run goes on; None: whoever is lost ends the run.

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
        wire_dtype: torch.dtype | None = None,
        by_name: Mapping[str, Tensor] | None = None,
        losses: LossWatch | None = None,
    ) -> None:
        self._socket = socket
        self._losses = losses
        self._next_look_s = 0.0
        self.ledger = Ledger(num_workers)
        self._wire_dtype = wire_dtype
        self._tables = [table_of(named, wire_dtype) for named in named_parameters]
        self._names = {p: name for named in named_parameters for name, p in named}
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._watch = watch
        self._on_step = on_step
        self._memory = WorkerMemory(len(optimizers), num_workers + 1) if shared else None
        allocators = self._memory.allocators if self._memory else [None] * len(optimizers)
        self.served: list[ServedOptimizer] = [
            self._serve_optimizer(optimizer, [p for _, p in named], part_mib, allocate)
            for optimizer, named, allocate in zip(optimizers, named_parameters, allocators, strict=True)
        ]
        self._growths = Growths(self.served, by_name or {})
        self._init_parts = {
            (number, bucket.index(), part)
            for number, served in enumerate(self.served)
            for bucket, part, _, _ in served.layout.all_parts()
        }
        """What is missing of the values to start from."""
        self._ids = {identity(worker): worker for worker in range(num_workers)}
        self._arrived: dict[int, Message] = {}
        """Hellos of such processes that are not admitted yet."""
        self._has_begun = False
        """Everybody was welcomed."""
        self._greeted: set[int] = set()
        self._left: dict[int, Any] = {}
        self._waiting_since: float | None = time.monotonic()
        self.statistics = ServerStatistics(num_workers)
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

    @abstractmethod
    def _go_on_without(self, worker: int) -> None:
        """Forget what a lost worker has pushed and is not in the parameters yet; nobody waits for it any more."""

    @abstractmethod
    def _go_on_with(self, worker: int) -> None:
        """Another process takes the place of a lost worker: it takes part from now on."""

    def serve(self) -> tuple[Any, Any]:
        """Block until every worker has said bye; return worker 0's farewell: ``(info, unpacked tree)``.

        Raises:
            WorkerFailed: naming the worker; the others have been told and their sockets may be closed.
        """
        try:
            while self._present():
                self._look_for_losses()  # not after the last one has left: the store may go with another server
                if self._socket.poll(_POLL_MS):
                    self._receive()
                else:
                    self._watch()
                    self._check_patience()
        except Exception as error:
            self._tell_all(Message(Kind.FAIL, info={"error": str(error) or repr(error)}))
            raise
        finally:
            if self._losses is not None:
                self._losses.close()
        return self._left[0]

    # -- messages --------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        frames = self._socket.recv_multipart(copy=False)
        if frames[0].bytes not in self._ids:
            raise ProtocolError(f"worker {frames[0].bytes!r} is not one of the {self._num_workers} expected")
        worker = self._ids[frames[0].bytes]
        is_lost = worker in self.ledger.losses
        if frames[0].bytes != identity(worker, self.ledger.incarnations[worker] + is_lost):
            self.ledger.refused += 1  # from a process whose place another one has taken, or may take
            return
        self.statistics.seen_ns[worker] = time.perf_counter_ns()
        message = Message.parse([frame.buffer for frame in frames[1:]])
        if is_lost:
            check_fields(worker, message)
            self._arrive(worker, message)
            return
        if message.kind not in _HANDLERS:
            raise ProtocolError(f"worker {worker} sends {message.kind.name}, which only the server may")
        check_fields(worker, message)
        self._check_turn(worker, message)
        if message.kind == Kind.STEP:
            check_settings(worker, message.info["groups"], self.served[message.optimizer].groups_of(worker))
            if isinstance(message.info.get("samples"), int):
                self.ledger.announce(worker, message.info["samples"])
            if worker == 0 and "admits" in message.info:
                self._admit(_integers(message.info["admits"]))
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
        with contextlib.suppress(zmq.ZMQError):  # it is gone, and whoever watches says so
            sender = identity(worker, self.ledger.incarnations[worker])
            self._socket.send_multipart([sender, *message.frames()], copy=False)
        if message.kind == Kind.DONE:
            self.tracer.answered(worker)

    def _tell_all(self, message: Message) -> None:
        for worker in self._greeted & self._present():
            self._send(worker, message)

    def _present(self) -> set[int]:
        """Workers that are neither lost nor have left."""
        return self.ledger.live - self._left.keys()

    def waited_for(self) -> tuple[set[int], float]:
        """For whom the others wait, and how many seconds since one of them came; nobody, 0 if nobody waits."""
        if self._waiting_since is None:
            return set(), 0.0
        missing = self.ledger.live - self._greeted
        return missing or self._late_workers(), time.monotonic() - self._waiting_since

    def _check_patience(self) -> None:
        """Name who keeps the others waiting."""
        missing, waited_s = self.waited_for()
        if self._waiting_since is None or waited_s < self._timeout_s:
            return
        greeted = self.ledger.live <= self._greeted
        what = "did not push the step that the others wait for" if greeted else "did not say hello"
        raise WorkerFailed(
            f"worker(s) {', '.join(map(str, sorted(missing)))} {what} within {self._timeout_s:g} s; "
            "--trainer.strategy.step_timeout_s raises the limit"
        )

    # -- workers that are lost -------------------------------------------------------------------------------

    def _look_for_losses(self) -> None:
        if self._losses is None or time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_S
        for worker, reason in self._losses.find().items():
            if worker in self._present():
                self.lose(worker, reason)
            elif worker in self.ledger.losses:
                self.ledger.let_in(worker)
                self.lose(worker, f"{reason} before it was let in")

    def lose(self, worker: int, reason: str) -> None:
        """Go on without ``worker``, whatever it sends from now on.

        Raises:
            WorkerFailed: it is needed, or the run has not begun, or does not go on without anybody.
        """
        if self._losses is None or worker == 0 or not self._has_begun:
            raise WorkerFailed(f"worker {worker} {reason}")
        error = f"the others have gone on without worker {worker}, which {reason}"
        self._send(worker, Message(Kind.FAIL, info={"error": error}))
        successor = identity(worker, self.ledger.incarnations[worker] + 1)
        if isinstance(self._socket, RouterLink):
            self._socket.replace(identity(worker, self.ledger.incarnations[worker]), successor)
        self._ids[successor] = worker
        self._greeted.discard(worker)
        self._arrived.pop(worker, None)
        self._growths.forget(worker)
        for served in self.served:
            served.detach(worker)
        self.statistics.left.add(worker)
        loss = self.ledger.lose(worker, reason)
        self._go_on_without(worker)
        self._losses.tell(loss)

    # -- workers that take the place of lost ones ------------------------------------------------------------

    def _admit(self, workers: set[int]) -> None:
        """Worker 0, which has told them where it is, announces the first step in which they take part."""
        self._next_look_s = 0.0
        self._look_for_losses()  # worker 0 knows of them
        for other in self.ledger.losses.keys() & workers:
            self.ledger.let_in(other)
            self.statistics.left.discard(other)
            self._go_on_with(other)
            if other in self._arrived:
                self._hello(other, self._arrived.pop(other))

    def _arrive(self, worker: int, message: Message) -> None:
        """The next process of a lost worker says hello before it is admitted."""
        if message.kind == Kind.HELLO:
            self._arrived[worker] = message
        else:
            self.ledger.refused += 1

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
            self.lose(worker, f"trains another model than the server: {difference}")
            return
        if self._memory:
            self._take_memory(worker, message.info["memory"] or {})
        if self._has_begun:
            self._send(worker, self._welcome_of(worker))
            assert self._losses is not None
            self._losses.tell_back(worker)
        else:
            self._welcome()

    def _init(self, worker: int, message: Message) -> None:
        if worker != 0:
            raise ProtocolError(f"worker {worker} sends initial values, which only worker 0 may")
        payload = self._payload(worker, message)
        target = self.served[message.optimizer].part(message.bucket, message.part, payload, exact=True)
        with torch.no_grad():
            target.copy_(tensor_from(payload, target.dtype))
        self._init_parts.discard((message.optimizer, message.bucket, message.part))
        self._welcome()

    def _welcome(self) -> None:
        """All have greeted and the values to start from are here: let everybody begin."""
        if len(self._greeted) == self._num_workers and not self._init_parts:
            self._waiting_since = None
            self._has_begun = True
            for worker in sorted(self._present()):
                self._send(worker, self._welcome_of(worker))

    def _welcome_of(self, worker: int) -> Message:
        memory = self._memory.handles() if self._memory else None
        return Message(Kind.WELCOME, info={"memory": memory, "steps": self._steps_of(worker)})

    def _steps_of(self, worker: int) -> int:
        """After which its own are numbered."""
        return 0

    def _take_memory(self, worker: int, memory: dict[str, Any]) -> None:
        """A worker tells where its memory is."""
        assert self._memory is not None
        self._memory.take(worker, memory, self.served)

    def _payload(self, worker: int, message: Message) -> Any:
        """The bytes that came with a message, or that it says are in the worker's shared memory."""
        if self._memory is None:
            return message.payload
        return self._memory.payload(worker, message, self.served[message.optimizer])

    def _count_step(self, times: dict[str, float]) -> None:
        self.statistics.count_step(times)
        self._on_step(self.statistics)

    # -- phase: grow -----------------------------------------------------------------------------------------

    def _grow(self, worker: int, message: Message) -> None:
        """Parameters join an optimizer, between two steps of this worker."""
        number, request = message.optimizer, {key: message.info[key] for key in ("unfrozen", "groups")}
        if self._growths.is_new(worker, number, request):
            self._take_in(worker, message, request)
        first, handle = self._growths.attach(worker, number)
        specs = self.served[number].layout.specs[first : len(self.served[number].buckets_of(worker))]
        if self._memory and specs:
            self._take_grown_memory(worker, number, first, specs, message.info["memory"] or {})
        self._send(worker, Message(Kind.GROWN, number, info=handle))

    def _take_in(self, worker: int, message: Message, request: dict[str, Any]) -> None:
        """Nobody has asked for this before."""
        joining = self._growths.check(worker, message.optimizer, request, len(message.payload))
        self._names |= {p: name for name, p in joining.named}
        memory = SharedBuffers(self._num_workers + 1) if self._memory else None
        self._growths.grow(message.optimizer, request, joining, message.payload, memory)

    def _take_grown_memory(
        self, worker: int, number: int, first: int, specs: list[BufferSpec], memory: dict[str, Any]
    ) -> None:
        assert self._memory is not None
        self._memory.take_grown(worker, number, first, specs, memory, self.served[number])

    # -- values ----------------------------------------------------------------------------------------------

    def _fetch(self, worker: int, message: Message) -> None:
        layout = self.served[message.optimizer].layout
        for bucket in self.served[message.optimizer].buckets_of(worker):
            if layout.is_narrowed(bucket):
                self._send_exact_values(message.optimizer, bucket, worker)
            else:
                self._send_values(message.optimizer, bucket, [worker])
        self._send(worker, Message(Kind.DONE, message.optimizer, info={}))

    def _take_part(self, worker: int, message: Message) -> int:
        """Keep a part of a push; returns its bytes."""
        with self.tracer.part("receive", bucket=message.bucket, part=message.part, worker=worker):
            payload = self._payload(worker, message)
            self.served[message.optimizer].add(worker, message.bucket, message.part, payload)
        return len(payload)

    def _send_exact_values(self, number: int, bucket: Bucket, worker: int) -> None:
        """The bucket's parameters unrounded, in a message even where there is shared memory."""
        served = self.served[number]
        start_ns = time.perf_counter_ns()
        for part, (start, end) in enumerate(served.layout.parts(bucket)):
            payload = bytes(tensor_bytes(served.values(bucket, start, end).cpu()))
            self._send(worker, Message(Kind.PULL, number, bucket.index(), part, payload=payload))
            self.statistics.sent_bytes += len(payload)
        self.statistics.send_ns += time.perf_counter_ns() - start_ns

    def _send_values(self, number: int, bucket: Bucket, workers: Iterable[int]) -> None:
        """The bucket's current parameters as they travel, to ``workers``."""
        with self.tracer.part("send", bucket=bucket.index(), workers=list(workers)):
            self._send_parts(number, bucket, workers)

    def _send_parts(self, number: int, bucket: Bucket, workers: Iterable[int]) -> None:
        served = self.served[number]
        start_ns = time.perf_counter_ns()
        for part, (start, end) in enumerate(served.layout.parts(bucket)):
            values = served.reply(bucket, start, end)
            if served.layout.is_narrowed(bucket):
                check_parameters(bucket, values, served.values(bucket, start, end), self._names)
            for worker in workers:
                payload = self._reply(worker, number, bucket.index(), start, values)
                self._send(worker, Message(Kind.PULL, number, bucket.index(), part, payload=payload))
                self.statistics.sent_bytes += values.nbytes
        self.statistics.send_ns += time.perf_counter_ns() - start_ns

    @abstractmethod
    def _reply(self, worker: int, number: int, bucket_index: int, start: int, values: Tensor) -> Any:
        """The bytes of ``values`` for a message; None once they are in shared memory where the worker reads them."""

    # -- optimizer state -------------------------------------------------------------------------------------

    def _get_state(self, worker: int, message: Message) -> None:
        info, payload = pack_tree(self.served[message.optimizer].state_dict_of(worker))
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
        self.statistics.left.add(worker)

    def _fail(self, worker: int, message: Message) -> None:
        self.lose(worker, f"failed: {message.info['error']}")

    def release(self) -> None:
        """Give every parameter memory of its own again, for whoever uses the model after the run."""
        for aggregator in self.served:
            for group in aggregator.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data = parameter.data.clone()
        if self._memory is not None:
            self._memory.seal()
        self._growths.seal()


def _integers(values: Any) -> set[int]:
    return {value for value in values if type(value) is int} if isinstance(values, list) else set()


def _unpack(worker: int, description: Any, payload: Any) -> Any:
    try:
        return unpack_tree(description, payload)
    except (MalformedTree, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ProtocolError(f"worker {worker} sends a tree that cannot be unpacked: {error!r}") from error


_OF_AN_OPTIMIZER = {Kind.INIT, Kind.STEP, Kind.PUSH, Kind.FETCH, Kind.GET_STATE, Kind.SET_STATE, Kind.GROW}

_HANDLERS: dict[Kind, Callable[[ParameterServer, int, Message], None]] = {
    Kind.HELLO: ParameterServer._hello,
    Kind.INIT: ParameterServer._init,
    Kind.STEP: lambda server, worker, message: server._step(worker, message),
    Kind.PUSH: lambda server, worker, message: server._push(worker, message),
    Kind.FETCH: ParameterServer._fetch,
    Kind.GET_STATE: ParameterServer._get_state,
    Kind.SET_STATE: ParameterServer._set_state,
    Kind.GROW: lambda server, worker, message: server._grow(worker, message),
    Kind.BYE: lambda server, worker, message: server._bye(worker, message),
    Kind.FAIL: ParameterServer._fail,
}
