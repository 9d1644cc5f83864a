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
from ..comm.server.ledger import Loss, LossWatch

_BEAT_S = 1.0
DEAD_S = 5.0
"""A worker that says nothing for so long is lost."""
_LAST_WORDS_S = 0.3
"""What a process has sent may be read after its end is seen, and says more than its exit code."""
_BYE_S = 1.0
"""The same where there is no exit code: it may have left in good order."""


@final
class Heartbeat:
    """Says every second that this worker lives, from a thread of its own until :meth:`stop`."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store.clone()  # torch's stores serve one caller at a time
        self._key = f"beat {rank}"
        store.set(_process_key(rank), json.dumps([host_identity(), os.getpid()]))
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
        self._live = set(range(num_workers))
        self._losses: list[Loss] = []

    def losses(self) -> list[Loss]:
        """All so far, in the order of their loss as this process saw it."""
        for worker in sorted(self._live):
            if self._store.check([_key(worker)]):
                self._live.remove(worker)
                self._losses.append(Loss(**json.loads(self._store.get(_key(worker)))))
        return self._losses

    @override
    def find(self) -> Mapping[int, str]:
        return {loss.worker: loss.reason for loss in self.losses()}

    @override
    def tell(self, loss: Loss) -> None:
        """Nobody: the first server has told."""

    @override
    def close(self) -> None:
        """What was found so far stays; the store may end."""
        self._live.clear()


@final
class LossFinder(LossWatch):
    """For the first server, which has started the others, unless torchrun has.

    Args:
        store: Of the run.
        num_workers: How many there were.
        exit_codes: Of the workers' processes that have ended, by worker.
        give_up: Ends the process of a lost worker, if it has not ended.
    """

    def __init__(
        self,
        store: dist.Store,
        num_workers: int,
        exit_codes: Callable[[], Mapping[int, int]],
        give_up: Callable[[int], None],
    ) -> None:
        self._store = store
        self._num_workers = self._num_live = num_workers
        self._exit_codes = exit_codes
        self._give_up = give_up
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
        key = f"beat {worker}"
        if self._store.check([key]):
            if worker not in self._processes:
                self._processes[worker] = self._open(worker)
            beat = self._store.get(key)
            if beat != self._beats.get(worker, (b"", 0.0))[0]:
                self._beats[worker] = beat, now

    def _open(self, worker: int) -> int | None:
        """A descriptor that becomes readable when the worker's process ends, if that is on this host."""
        host, pid = json.loads(self._store.get(_process_key(worker)))
        with contextlib.suppress(ProcessLookupError):  # it has ended already, which its silence will tell
            return os.pidfd_open(pid) if host == host_identity() else None
        return None

    @override
    def close(self) -> None:
        for descriptor in self._processes.values():
            if descriptor is not None:
                os.close(descriptor)
        self._processes.clear()

    @override
    def tell(self, loss: Loss) -> None:
        self._store.set(_key(loss.worker), json.dumps(asdict(loss)))
        self._num_live -= 1
        self._give_up(loss.worker)
        print(
            f"gradsync: warning: worker {loss.worker} {loss.reason}, after {loss.pushes} steps: the run goes on with "
            f"{self._num_live} of {self._num_workers} workers",
            file=sys.stderr,
            flush=True,
        )


def _key(worker: int) -> str:
    return f"lost {worker}"


def _process_key(worker: int) -> str:
    return f"process of {worker}"


def _has_ended(process: int | None) -> bool:
    return process is not None and bool(select.select([process], [], [], 0)[0])


def _how(code: int | None) -> str:
    if code is None:
        return "ended without a word"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
