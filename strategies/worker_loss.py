"""Which workers are lost: found by the first server, known to every process through the store of the run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import final

import torch.distributed as dist
from typing_extensions import override

from ..comm.hosts import host_identity
from ..comm.server.ledger import Loss, LossWatch, identity

_BEAT_S = 1.0
DEAD_S = 5.0
"""A worker that says nothing for so long is lost."""
_LAST_WORDS_S = 0.3
"""What a process has sent may be read after its end is seen, and says more than its exit code."""
_BYE_S = 1.0
"""The same where there is no exit code: it may have left in good order."""


@final
class Heartbeat:
    """Says every second that this worker's process lives, from a thread of its own until :meth:`stop`."""

    def __init__(self, store: dist.Store, rank: int, incarnation: int) -> None:
        self._store = store.clone()  # torch's stores serve one caller at a time
        name = identity(rank, incarnation)
        self._key = _key("beat of", name)
        store.set(_key("process of", name), json.dumps([host_identity(), os.getpid()]))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):  # its host has gone, which others tell
            for number in itertools.count():
                self._store.set(self._key, str(number))
                if self._stopped.wait(_BEAT_S):
                    return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


@final
class LostWorkers(LossWatch):
    """What the first server has found, for the other processes."""

    def __init__(self, store: dist.Store, num_workers: int) -> None:
        self._store = store
        self._incarnations = dict.fromkeys(range(num_workers), 0)
        self._losses: list[Loss] = []
        self._num_found = 0

    def losses(self) -> list[Loss]:
        """All so far, in the order of their loss as this process saw it."""
        with contextlib.suppress(dist.DistError, RuntimeError):  # its host has gone, which others tell
            for worker, incarnation in self._incarnations.items():
                if self._store.check([key := _key("lost", identity(worker, incarnation))]):
                    self._incarnations[worker] += 1
                    self._losses.append(Loss(**json.loads(self._store.get(key))))
        return self._losses

    @override
    def find(self) -> Mapping[int, str]:
        new = self.losses()[self._num_found :]
        self._num_found += len(new)
        return {loss.worker: loss.reason for loss in new}

    @override
    def tell(self, loss: Loss) -> None:
        """Nobody: the first server has told."""

    @override
    def tell_back(self, worker: int) -> None:
        """Nobody either."""

    @override
    def close(self) -> None:
        """What was found so far stays; the store may end."""
        self._incarnations.clear()


@final
class LossFinder(LossWatch):
    """For the first server, which has started the others, unless torchrun has.

    Args:
        store: Of the run.
        num_workers: How many there were.
        exit_codes: Of the workers' processes that have ended, by worker.
        replace: Ends the process of a lost worker, if it has not ended, and starts another, which is to be this
            incarnation; returns whether it has.
    """

    def __init__(
        self,
        store: dist.Store,
        num_workers: int,
        exit_codes: Callable[[], Mapping[int, int]],
        replace: Callable[[int, int], bool],
    ) -> None:
        self._store = store
        self._num_workers = num_workers
        self._live = set(range(num_workers))
        self._exit_codes = exit_codes
        self._replace = replace
        self._incarnations = dict.fromkeys(range(num_workers), 0)
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._next_s = 0.0
        self._processes: dict[int, int | None] = {}
        self._ended_at: dict[int, float] = {}

    @override
    def find(self) -> Mapping[int, str]:
        now = time.monotonic()
        return {**self._silent(now), **self._ended(now)}

    def _ended(self, now: float) -> dict[int, str]:
        codes = self._exit_codes()
        ended = codes.keys() | {worker for worker, process in self._processes.items() if _has_ended(process)}
        since = {worker: self._ended_at.setdefault(worker, now) for worker in ended}
        patience = {worker: _LAST_WORDS_S if worker in codes else _BYE_S for worker in ended}
        return {w: _how(codes.get(w)) for w in ended if now - since[w] > patience[w]}

    def _silent(self, now: float) -> dict[int, str]:
        if now >= self._next_s:
            self._next_s = now + _BEAT_S
            for worker in range(self._num_workers):
                self._hear(worker, now)
        return {w: f"said nothing for {DEAD_S:g} s" for w, (_, at) in self._beats.items() if now - at > DEAD_S}

    def _hear(self, worker: int, now: float) -> None:
        key = _key("beat of", identity(worker, self._incarnations[worker]))
        if self._store.check([key]):
            if worker not in self._processes:
                self._processes[worker] = self._open(worker)
            beat = self._store.get(key)
            if beat != self._beats.get(worker, (b"", 0.0))[0]:
                self._beats[worker] = beat, now

    def _open(self, worker: int) -> int | None:
        """A descriptor that becomes readable when the worker's process ends, if that is on this host."""
        host, pid = json.loads(self._store.get(_key("process of", identity(worker, self._incarnations[worker]))))
        with contextlib.suppress(ProcessLookupError):  # it has ended already, which its silence will tell
            return os.pidfd_open(pid) if host == host_identity() else None
        return None

    @override
    def close(self) -> None:
        for worker in list(self._processes):
            self._forget(worker)

    def _forget(self, worker: int) -> None:
        if (descriptor := self._processes.pop(worker, None)) is not None:
            os.close(descriptor)
        self._beats.pop(worker, None)
        self._ended_at.pop(worker, None)

    @override
    def tell(self, loss: Loss) -> None:
        self._store.set(_key("lost", identity(loss.worker, loss.incarnation)), json.dumps(asdict(loss)))
        self._forget(loss.worker)
        self._incarnations[loss.worker] = loss.incarnation + 1
        self._live.discard(loss.worker)
        text = f"worker {loss.worker} {loss.reason}, after {loss.pushes} steps: the run goes on with "
        text += f"{len(self._live)} of {self._num_workers} workers"
        if self._replace(loss.worker, loss.incarnation + 1):
            text += ", and a new process is started in its place"
        print(f"gradsync: warning: {text}", file=sys.stderr, flush=True)

    @override
    def tell_back(self, worker: int) -> None:
        self._live.add(worker)
        text = f"worker {worker} is back, in another process: {len(self._live)} of {self._num_workers} workers"
        print(f"gradsync: {text}", file=sys.stderr, flush=True)


def _key(what: str, name: bytes) -> str:
    return f"{what} {name.decode()}"


def _has_ended(process: int | None) -> bool:
    return process is not None and bool(select.select([process], [], [], 0)[0])


def _how(code: int | None) -> str:
    if code is None:
        return "ended without a word"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
