"""The server's side of a run: what serves, who watches the workers, and what the server says."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
import zmq
from torch import Tensor
from torch.optim import Optimizer

from ..comm.server import AsyncServer, ParameterServer, ServerStatistics, SyncServer, WorkerFailed
from ..comm.server.ledger import LossWatch
from ..comm.server.peers import Peers
from ..comm.server.servers_client import Named, name_pieces, pieces_of
from ..comm.server.shards import Cut
from ..comm.tracer import Tracer
from ..restarts import Progress
from .server_launcher import ServerLauncher
from .server_options import ServerOptions
from .server_view import ServerView
from .worker_loss import LossFinder, LostWorkers

PROGRESS_KEY = "steps"
_PROGRESS_S = 1.0
"""How often an async server tells how far it is."""


@final
class Serving:
    """Serves one fit, evaluation or prediction in a server's process.

    Args:
        number: Of this server.
        store: Of this run.
        socket: Bound.
        num_workers: How many push.
        timeout: How long a worker may keep others waiting.
        part_mib: Size of a part.
        shared: Whether tensors go through shared memory.
        log_every: Steps between two lines on the console and two points in TensorBoard; 0 for none.
        launcher: Has started the other processes, unless torchrun has.
        peers: Move gradients and parameters instead of the socket, if given.
    """

    def __init__(
        self,
        options: ServerOptions,
        number: int,
        store: dist.Store,
        socket: zmq.Socket[bytes],
        num_workers: int,
        timeout: timedelta,
        part_mib: float,
        shared: bool,
        log_every: int,
        launcher: ServerLauncher,
        peers: Peers | None,
    ) -> None:
        self._options = options
        self._number = number
        self._store = store
        self._socket = socket
        self._num_workers = num_workers
        self._timeout = timeout
        self._part_mib = part_mib
        self._shared = shared
        self._view = ServerView(store, number if options.servers > 1 else None, log_every, num_workers, options.is_sync)
        self._server: ParameterServer | None = None
        self._launcher = launcher
        self._num_replaced = 0
        self._peers = peers
        self.tracer = Tracer()
        """Told what is done when."""
        self._applied: list[int] = []
        self._told_progress = 0.0
        self._progress: Progress | None = None

    def serve(
        self,
        optimizers: list[Optimizer],
        named: list[Named],
        cuts: list[list[list[Cut]]],
        by_name: Mapping[str, Tensor],
    ) -> tuple[Any, Any]:
        """Block until all workers have left; worker 0's last words.

        Args:
            optimizers: As configured. While this blocks their groups hold what this server serves.
            named: Per optimizer, all its parameters with their names.
            cuts: Per optimizer and server, what that serves.
            by_name: All parameters of the module: those may join an optimizer in mid-run.

        Raises:
            WorkerFailed: naming the worker.
        """
        pieces = pieces_of(named, cuts, self._number)
        whole = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        for optimizer, own, groups in zip(optimizers, pieces, whole, strict=True):
            of_group = {p: index for index, group in enumerate(groups) for p in group}
            for index, group in enumerate(optimizer.param_groups):
                group["params"] = [piece.tensor for piece in own if of_group[piece.parameter] == index]
        server = self._server = self._make_server(optimizers, name_pieces(named, pieces), by_name)
        server.trace(self.tracer)
        try:
            farewell = server.serve()
            self._await_servers()
            return farewell
        finally:
            for worker in server.ledger.losses:  # a process that would take its place waits to be let in
                self._replace(worker, None)
            self._options.write_schedule(self._applied)
            server.release()
            for optimizer, groups in zip(optimizers, whole, strict=True):
                del optimizer.param_groups[len(groups) :]  # joined in mid-run, and may hold pieces
                for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                    group["params"] = parameters
            self._view.close(server.statistics)

    def _make_server(
        self, optimizers: list[Optimizer], named: list[list[tuple[str, Tensor]]], by_name: Mapping[str, Tensor]
    ) -> ParameterServer:
        common = (
            *(self._socket, optimizers, named, self._num_workers, self._timeout.total_seconds(), self._part_mib),
            *(self.watch, self._report, self._shared, self._options.dtype_on_wire, by_name, self._losses()),
        )
        if not self._options.is_sync:
            return AsyncServer(
                *common,
                staleness=self._options.bound,
                corrects_staleness=self._options.staleness_correction,
                schedule=self._options.schedule(),
                on_apply=self._note_applied,
            )
        server = SyncServer(*common, peers=self._peers)
        if self._options.servers > 1:
            add = self._make_sum()
            for served in server.served:
                served.sum_over_servers = add
        return server

    def _await_servers(self) -> None:
        """Where workers may be lost, the first server waits for the others, which learn of that from its store."""
        if not self._options.goes_on:
            return
        if self._number > 0:
            self._store.set(f"served {self._number}", "")
        elif others := [f"served {number}" for number in range(1, self._options.servers)]:
            with contextlib.suppress(dist.DistError, RuntimeError):  # one has failed, which others tell
                self._store.wait(others, self._timeout)

    def _losses(self) -> LossWatch | None:
        """Who finds lost workers, if the run goes on without them."""
        if not self._options.goes_on:
            return None
        if self._number > 0:
            return LostWorkers(self._store, self._num_workers)
        first = self._options.servers
        return LossFinder(
            self._store,
            self._num_workers,
            lambda: {rank - first: code for rank, code in self._launcher.exit_codes().items() if rank >= first},
            self._replace,
        )

    def _replace(self, worker: int, incarnation: int | None) -> bool:
        """End the worker's process, and start another for the next ``incarnation`` if that may be."""
        may_start = incarnation is not None and self._num_replaced < self._options.max_replacements
        rank = worker + self._options.servers
        starts = self._launcher.replace(rank, f"worker {worker}", incarnation if may_start else None)
        self._num_replaced += starts
        return starts

    def _make_sum(self) -> Callable[[float], float]:
        """Adds up a number over all servers, which are all in the same step. Blocks until they are here."""
        store = dist.PrefixStore("servers", self._store)
        group: Any = dist.ProcessGroupGloo(store, self._number, self._options.servers, self._timeout)

        def add(value: float) -> float:
            total = torch.tensor([value], dtype=torch.float64)
            group.allreduce([total]).wait()
            return total.item()

        return add

    def _note_applied(self, worker: int) -> None:
        if self._options.record_schedule is not None:
            self._applied.append(worker)

    def watch(self) -> None:
        """While nothing comes. Raise WorkerFailed if a process that this one started has ended with an error."""
        for rank, code in self._launcher.exit_codes().items():
            if rank >= self._options.servers and self._options.goes_on and self._server is not None:
                continue  # the server itself looks for those
            who = f"worker {rank - self._options.servers}" if rank >= self._options.servers else f"server {rank}"
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerFailed(f"{who} {how}")
        if self._server is not None:
            self._view.on_idle(self._server)

    def _report(self, statistics: ServerStatistics) -> None:
        if not self._options.is_sync and time.monotonic() > self._told_progress + _PROGRESS_S:
            self._told_progress = time.monotonic()
            self._store.set(PROGRESS_KEY, str(statistics.total_steps))
        if statistics.total_steps == 1:
            self._progress = Progress.of_run()
        if self._progress is not None:
            self._progress.note(statistics.total_steps)
        self._view.on_step(statistics)
