"""The ways to push, step and pull that `server.py` compares: same gradients, optimizer and number of steps in all."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
import torchvision
import zmq
from harness import Metrics, Process
from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import override

from gradsync.comm import Timeline
from gradsync.comm.memory import keep_freed_memory
from gradsync.comm.packing import tensor_bytes
from gradsync.comm.server import RemoteOptimizer, SyncServer, WorkerClient
from gradsync.comm.server.naive import NaivePeers
from gradsync.strategies.rendezvous import make_socket_folder, remove_socket_folder

Named = list[tuple[str, Tensor]]

_WARMUP_STEPS = 2
"""The optimizer makes its state in the first, caches and sockets are as they stay after the second."""
_SOCKET_PART_MIB, _SHARED_PART_MIB = 4.0, 16.0
"""The defaults of ParameterServerStrategy."""


@final
@dataclass(frozen=True)
class Workload:
    """What every row does."""

    named: Named
    """The parameters as they are at the start; every process has copies of its own."""
    num_steps: int
    """Those that are timed."""
    timeout_s: float

    @classmethod
    def of(cls, arch: str, num_steps: int, timeout_s: float) -> Workload:
        torch.manual_seed(0)
        return cls(list(torchvision.models.get_model(arch).named_parameters()), num_steps, timeout_s)

    @property
    def num_bytes(self) -> int:
        """Of all gradients."""
        return sum(p.nbytes for _, p in self.named)

    @property
    def total_steps(self) -> int:
        return _WARMUP_STEPS + self.num_steps

    def copies(self) -> Named:
        return [(name, nn.Parameter(p.detach().clone())) for name, p in self.named]


@final
class Gradients:
    """Random ones, other ones in every step."""

    def __init__(self, parameters: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        self._base = [torch.randn(p.shape, generator=generator) for p in parameters]

    def fill(self, step: int, targets: list[Tensor]) -> None:
        for base, target in zip(self._base, targets, strict=True):
            torch.mul(base, 1.0 / (1 + step), out=target)


def optimizer_of(parameters: list[Tensor]) -> SGD:
    return SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


class Row(ABC):
    """One way to do it. Process 0 serves, process 1 works."""

    def run(self, process: Process, workload: Workload) -> Metrics:
        """The life of either process: medians over steps, the warm-up left out.

        Raises:
            ArithmeticError: the worker ends with other parameters than a local optimizer's.
        """
        torch.set_num_threads(1)
        keep_freed_memory()
        timeout = timedelta(seconds=workload.timeout_s)
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, process.index == 0, timeout)
        named = workload.copies()
        if process.index == 1:
            return self._work(workload, store, named)
        at_ends: list[float] = []
        self.serve(workload, store, named, lambda: at_ends.append(time.process_time()))
        spent = [1000 * (end - start) for start, end in itertools.pairwise(at_ends)]
        return {"cpu_ms": statistics.median(spent[_WARMUP_STEPS - 1 :])}

    def _work(self, workload: Workload, store: dist.Store, named: Named) -> Metrics:
        parameters = [p for _, p in named]
        gradients, samples = Gradients(parameters), []
        with self.worker(workload, store, named) as push_and_pull:
            targets = [p.grad for p in parameters if p.grad is not None]
            for step in range(workload.total_steps):
                gradients.fill(step, targets)
                before = (time.perf_counter(), time.process_time())
                push_and_pull()
                after = (time.perf_counter(), time.process_time())
                samples.append([1000 * (end - start) for start, end in zip(before, after, strict=True)])
        _check(workload, gradients, parameters)
        wall_ms, cpu_ms = (statistics.median(column) for column in zip(*samples[_WARMUP_STEPS:], strict=True))
        return {"wall_ms": wall_ms, "cpu_ms": cpu_ms}

    @abstractmethod
    def serve(self, workload: Workload, store: dist.Store, named: Named, step_done: Callable[[], None]) -> None:
        """All steps of the server, which owns ``named``."""

    @abstractmethod
    def worker(
        self, workload: Workload, store: dist.Store, named: Named
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Connect, give every parameter a gradient, and yield what pushes them and brings the new parameters."""


def _check(workload: Workload, gradients: Gradients, parameters: list[Tensor]) -> None:
    expected = [p for _, p in workload.copies()]
    optimizer = optimizer_of(expected)
    for parameter in expected:
        parameter.grad = torch.empty_like(parameter)
    for step in range(workload.total_steps):
        gradients.fill(step, [p.grad for p in expected if p.grad is not None])
        optimizer.step()
    if not all(map(torch.equal, expected, parameters)):
        raise ArithmeticError("the parameters are not those of a local optimizer")


@final
class RawTcp(Row):
    """Gradients and parameters are one block each: nothing is copied but by the kernel, and nothing overlaps."""

    @override
    def serve(self, workload: Workload, store: dist.Store, named: Named, step_done: Callable[[], None]) -> None:
        values, gradients = _flatten(named)
        optimizer = optimizer_of([p for _, p in named])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            store.set("port", str(listener.getsockname()[1]))
            connection, _ = listener.accept()
        with connection:
            for _ in range(workload.total_steps):
                _receive_into(connection, gradients)
                optimizer.step()
                connection.sendall(values)
                step_done()

    @contextlib.contextmanager
    @override
    def worker(self, workload: Workload, store: dist.Store, named: Named) -> Iterator[Callable[[], None]]:
        values, gradients = _flatten(named)
        with socket.create_connection(("127.0.0.1", int(store.get("port")))) as connection:

            def push_and_pull() -> None:
                connection.sendall(gradients)
                _receive_into(connection, values)

            yield push_and_pull


def _flatten(named: Named) -> tuple[memoryview, memoryview]:
    """Move parameters and gradients into one block each; their bytes."""
    values = torch.cat([p.detach().reshape(-1) for _, p in named])
    gradients = torch.zeros_like(values)
    sizes = [p.numel() for _, p in named]
    for (_, parameter), value, gradient in zip(named, values.split(sizes), gradients.split(sizes), strict=True):
        parameter.data, parameter.grad = value.view_as(parameter), gradient.view_as(parameter)
    return tensor_bytes(values), tensor_bytes(gradients)


def _receive_into(connection: socket.socket, block: memoryview) -> None:
    """Raises ConnectionError if the peer leaves before ``block`` is full."""
    while block:
        num_bytes = connection.recv_into(block, len(block), socket.MSG_WAITALL)
        if num_bytes == 0:
            raise ConnectionError("the peer has left")
        block = block[num_bytes:]


@final
class Gradsync(Row):
    """gradsync's server and client as the strategy makes them, for one worker."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._is_shared = transport == "shared_memory"
        self.part_mib = _SHARED_PART_MIB if self._is_shared else _SOCKET_PART_MIB

    @override
    def serve(self, workload: Workload, store: dist.Store, named: Named, step_done: Callable[[], None]) -> None:
        with _zmq_socket(zmq.ROUTER) as server_socket:
            server_socket.router_mandatory = True
            endpoint = self._bind(server_socket)
            store.set("endpoint", endpoint)
            server = SyncServer(
                server_socket,
                [optimizer_of([p for _, p in named])],
                [named],
                num_workers=1,
                timeout_s=workload.timeout_s,
                part_mib=self.part_mib,
                watch=lambda: None,
                on_step=lambda _: step_done(),
                shared=self._is_shared,
                peers=self._naive(store, 0, workload.timeout_s),
            )
            try:
                server.serve()
            finally:
                remove_socket_folder(endpoint)

    def _bind(self, server_socket: zmq.Socket[bytes]) -> str:
        if self._transport == "tcp":
            return f"tcp://127.0.0.1:{server_socket.bind_to_random_port('tcp://127.0.0.1')}"
        endpoint = f"ipc://{make_socket_folder() / 'server'}"
        server_socket.bind(endpoint)
        return endpoint

    def _naive(self, store: dist.Store, rank: int, timeout_s: float) -> NaivePeers | None:
        if self._transport != "naive":
            return None
        return NaivePeers(dist.PrefixStore("naive", store), rank, 2, timedelta(seconds=timeout_s))

    @contextlib.contextmanager
    @override
    def worker(self, workload: Workload, store: dist.Store, named: Named) -> Iterator[Callable[[], None]]:
        with _zmq_socket(zmq.DEALER) as worker_socket:
            worker_socket.routing_id = b"0"
            worker_socket.connect(store.get("endpoint").decode())
            client = WorkerClient(
                worker_socket,
                [named],
                rank=0,
                timeout_s=workload.timeout_s,
                part_mib=self.part_mib,
                timeline=Timeline(),
                peers=self._naive(store, 1, workload.timeout_s),
                sharing_workers=1 if self._is_shared else None,
            )
            client.start()
            for _, parameter in named:
                parameter.grad = torch.zeros_like(parameter)
            yield RemoteOptimizer(optimizer_of([p for _, p in named]), client, 0).step
            client.bye()


@contextlib.contextmanager
def _zmq_socket(kind: int) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: Any = context.socket(kind)
    made.set_hwm(0)
    try:
        yield made
    finally:
        context.destroy(linger=1000)


ROWS: dict[str, Row] = {
    "raw_tcp": RawTcp(),
    "tcp": Gradsync("tcp"),
    "ipc": Gradsync("ipc"),
    "shared_memory": Gradsync("shared_memory"),
    "naive": Gradsync("naive"),
}
