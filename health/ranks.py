"""Ranks that are really started: all of them here, or this process's one of those that torchrun started."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, final

import torch.distributed as dist

from ..strategies.rendezvous import connect_store
from .child import Body, Child, Tell, listen
from .measurements import Place, measure, steps_of
from .planned_run import Launched, PlannedRun

_LAST_WORDS_S = 1.0
"""After the first failure, for that which caused it."""

_KILLED, _OWN, _CONSEQUENCE = range(3)
"""Why a rank ended, the true reason first: what its peers say may come before it."""

_STORE_S = 2.0


@final
@dataclass(frozen=True)
class Failure:
    """How a rank ended; ``why``: one of the above."""

    rank: int
    text: str
    why: int


@final
@dataclass
class Outcome:
    """What became of the ranks.

    Attributes:
        own: Ranks that this process starts.
        at: Index of the step (:func:`.steps_of`) that each rank has arrived at.
        results: Of :func:`.measure`, of the own ranks that came through.
        failures: In the order in which they were heard of.
        stopped: Ranks that do not run, because a signal stopped them.
    """

    world_size: int
    own: set[int]
    at: dict[int, int] = field(init=False)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = dict.fromkeys(range(self.world_size), 0)

    def is_complete(self) -> bool:
        return self.results.keys() == self.own

    def first_failure(self) -> Failure | None:
        """The one that caused the others, as far as that can be told."""
        return min(self.failures, key=lambda failure: failure.why, default=None)

    def missing(self) -> list[int]:
        """Those that the others wait for, as far as that can be told."""
        furthest = max(self.at.values())
        return sorted({*self.stopped, *(rank for rank, step in self.at.items() if step < furthest)})

    def step(self, rank: int) -> str:
        return steps_of(self.world_size)[self.at[rank]]


def start_here(run: PlannedRun) -> Outcome:
    """All ranks on this host, meeting on loopback. Blocks; none is left on return, nor if this process is killed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listener.getsockname()[1]

    def connect(rank: int, timeout: timedelta) -> dist.Store:
        handle = listener.detach() if rank == 0 else None
        return dist.TCPStore("127.0.0.1", port, None, rank == 0, timeout, False, master_listen_fd=handle)

    bodies = {}
    for rank in range(run.devices):
        place = Place(rank, run.devices, rank, run.backend, True, run.timeout_s)
        bodies[rank] = _body(place, lambda place=place: connect(place.rank, place.timeout))
    with listener:
        return _follow(bodies, run.timeout_s, Outcome(run.devices, set(bodies)))


def join_launched(run: PlannedRun, launched: Launched) -> Outcome:
    """This process's rank, with those of the launcher's other processes, which call this too. Blocks."""
    rank, size = launched.rank, launched.world_size
    place = Place(rank, size, launched.local_rank, run.backend, launched.local_world_size == size, run.timeout_s)

    def connect() -> dist.Store:
        return connect_store(launched.address, launched.port, rank, place.timeout)[0]

    return _follow({rank: _body(place, connect)}, run.timeout_s, Outcome(size, {rank}), lambda: _positions(launched))


def _body(place: Place, connect: Callable[[], dist.Store]) -> Body:
    steps = steps_of(place.world_size)

    def body(tell: Tell) -> None:
        stores: list[dist.Store] = []

        def connected() -> dist.Store:
            stores.append(connect())
            return stores[0]

        def arrive(step: str) -> None:
            tell({"at": steps.index(step)})
            for store in stores:  # for processes that do not hear this one
                store.set(f"doctor at {place.rank}", str(steps.index(step)))

        tell({"result": measure(place, connected, arrive)})

    return body


def _follow(
    bodies: dict[int, Body],
    patience_s: float,
    outcome: Outcome,
    positions: Callable[[], dict[int, int]] = dict,
) -> Outcome:
    """``positions``: steps of ranks that this process has not started."""
    children: dict[int, Child] = {}
    try:
        for rank, body in bodies.items():
            children[rank] = Child(body)
        _hear(children, patience_s, outcome)
        if outcome.failures:
            rest = {rank: child for rank, child in children.items() if not child.has_ended}
            _hear(rest, _LAST_WORDS_S, outcome, to_the_end=True)
        elif not outcome.is_complete():
            outcome.stopped = [rank for rank, child in children.items() if child.is_stopped()]
            outcome.at |= positions()
    except OSError as error:  # the limit of processes, of a user or a container
        outcome.failures.append(Failure(len(children), f"no process can be started: {error}", _OWN))
    finally:
        for child in children.values():
            child.end()
    return outcome


def _hear(children: dict[int, Child], patience_s: float, outcome: Outcome, to_the_end: bool = False) -> None:
    """Until all ranks are through, one has failed (unless ``to_the_end``), or none says anything any more."""
    for rank, message in listen(children, patience_s):
        if message is None:
            if (number := children[rank].signal) is not None:
                text = f"was killed by {signal.Signals(number).name}"
                outcome.failures.append(Failure(rank, text, _KILLED))
        elif "error" in message:
            why = _CONSEQUENCE if message["is_lost_peer"] else _OWN
            outcome.failures.append(Failure(rank, message["error"], why))
        elif "at" in message:
            outcome.at[rank] = message["at"]
        else:
            outcome.results[rank] = message["result"]
        if outcome.is_complete() or (outcome.failures and not to_the_end):
            return


def _positions(launched: Launched) -> dict[int, int]:
    """As the ranks told the store, if there still is one."""
    try:
        timeout = timedelta(seconds=_STORE_S)
        client = dist.TCPStore(launched.address, launched.port, None, False, timeout, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"gradsync/{attempt}", client)
        keys = {rank: f"doctor at {rank}" for rank in range(launched.world_size)}
        return {rank: int(store.get(key)) if store.check([key]) else 0 for rank, key in keys.items()}
    except (dist.DistError, RuntimeError, ValueError):
        return {}
