"""Beside the collectives: which process of the run failed first, told to those on other hosts over the store."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import final

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..comm.diagnosis import is_timeout, says_lost_peer
from ..comm.server import ServerFailed, WorkerFailed
from ..errors import StoppedBySignal
from ..explain import is_consequence, one_line
from ..failures import FailureRecords
from ..processes import is_supervised
from ..strategies.served_world import ServedWorldStrategy
from .run_store import run_store

_BEAT_S = 0.25
_SILENT_S = 2.0
"""How long a process says nothing that is taken for gone, once a collective has failed."""
_SILENT_LOOKS = round(_SILENT_S / _BEAT_S)
_LOST_STORE = (dist.DistError, RuntimeError)
_FIRST = "first"


@final
class FailureChannel(Callback):
    """Names the first failure on every host, and ends the processes there, which would wait for the one that has gone.

    For ranks that no supervisor of ours sees together: on several hosts, and under torchrun. Elsewhere, and on one host
    under a strategy whose workers watch each other themselves, it does nothing. Every rank says four times a second
    that it lives, so that one that was killed can be told by its silence.
    """

    _end: _ChannelEnd | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy, apart = trainer.strategy, trainer.num_nodes > 1 or not is_supervised()
        if isinstance(strategy, ServedWorldStrategy):
            if trainer.num_nodes > 1:
                # The parameter server passes on what has failed, in good order: first let it.
                of_all = strategy.process_rank, strategy.num_all
                self._end = _ChannelEnd(strategy.store, *of_all, strategy.name, _SILENT_S)
        elif apart and trainer.world_size > 1 and dist.is_initialized():
            rank = trainer.global_rank
            self._end = _ChannelEnd(run_store(strategy), rank, trainer.world_size, f"rank {rank}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        end, self._end = self._end, None
        if end is None:
            return
        if isinstance(exception, (WorkerFailed, ServerFailed)) and not says_lost_peer(str(exception)):
            pass  # it names who has failed, or is missing
        elif is_consequence(exception):
            end.find_cause()
        elif _is_failure(exception):
            end.post(end.name, one_line(exception) or f"{type(exception).__name__}: {exception}")
        end.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()


@final
class _ChannelEnd:
    """That of one rank, with a thread of its own. Nothing here waits long for a store to which the link is cut.

    Args:
        store: Of the run; a connection of its own is made.
        rank: Among those that have an end.
        world_size: How many they are.
        name: What to call this one.
        grace_s: How long it may take to end by itself when another one has failed.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str, grace_s: float = 0.0) -> None:
        self._store = dist.PrefixStore("failures", store.clone())
        self._rank, self._world_size, self.name = rank, world_size, name
        self._grace_s = grace_s
        self._records = FailureRecords()
        self._closed = threading.Event()
        self._store.set(f"place of {rank}", f"{name} on {socket.gethostname()}")
        self._thread = threading.Thread(target=self._run, name="failure channel", daemon=True)
        self._thread.start()

    def post(self, who: str, error: str) -> None:
        """A process of this host has failed; only the first failure of the run is kept."""
        self._closed.set()
        first = f"{who} on {socket.gethostname()}: {error}"
        _within(_SILENT_S, lambda: self._store.compare_set(_FIRST, "", first))

    def find_cause(self) -> None:
        """A peer was lost: name whoever failed and end this process, or return if nobody can be named."""
        _within(4 * _SILENT_S, self._find_cause)

    def _find_cause(self) -> None:
        try:
            silent = self._silent()
            if silent and not self._store.check([_FIRST]):
                who = " and ".join(map(self._place_of, silent))
                self._store.compare_set(_FIRST, "", f"{who}: gone without a word, killed perhaps")
            if self._store.check([_FIRST]) and not self._closed.is_set():  # else it was this host's, which has said so
                self._leave(self._store.get(_FIRST).decode())
        except _LOST_STORE:
            host = "rank 0" if self.name.startswith("rank") else "server 0"
            self._leave(f"{host}: gone without a word, and the store of the run with it")

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_SILENT_S)
        self._records.close()

    def _run(self) -> None:
        with contextlib.suppress(*_LOST_STORE):  # its host has ended, or failed: then the collectives fail as well
            while not self._closed.wait(_BEAT_S):
                self._store.set(f"beat of {self._rank}", str(time.monotonic()))
                if self._store.check([_FIRST]):
                    first = self._store.get(_FIRST).decode()
                    if not self._closed.wait(self._grace_s):
                        self._leave(first)
                if (here := self._records.first()) is not None:  # the supervisor of this host has said so
                    self.post(*here.split(": ", 1))
            self._store.set(f"beat of {self._rank}", "ended")

    def _silent(self) -> list[int]:
        """Ranks whose beat has stopped; blocks until there are some, or the first failure is known.

        Looks are counted, and not seconds: a machine that stands still for a while makes nobody silent.
        """
        beats = {rank: b"" for rank in range(self._world_size) if rank != self._rank}
        heard_at = dict.fromkeys(beats, 0)
        for look in range(2 * _SILENT_LOOKS):
            if self._store.check([_FIRST]):
                break
            for rank, beat in beats.items():
                key = f"beat of {rank}"
                if self._store.check([key]) and (now := self._store.get(key)) != beat:
                    beats[rank], heard_at[rank] = now, look
            silent = [r for r, beat in beats.items() if beat != b"ended" and look - heard_at[r] >= _SILENT_LOOKS]
            if silent:
                return silent
            time.sleep(_BEAT_S)
        return []

    def _place_of(self, rank: int) -> str:
        key = f"place of {rank}"
        return self._store.get(key).decode() if self._store.check([key]) else f"rank {rank} on an unknown host"

    def _leave(self, first: str) -> None:
        """End this process hard: its main thread may wait in a collective for a long time."""
        if self._records.note(first):
            print(f"gradsync: error: {first}", file=sys.stderr)
        self._records.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _within(limit_s: float, talk: Callable[[], object]) -> None:
    """Talk to the store in another thread, and leave it there when it does not come back: the link is cut."""

    def attempt() -> None:
        with contextlib.suppress(*_LOST_STORE):
            talk()

    thread = threading.Thread(target=attempt, name="failure channel", daemon=True)
    thread.start()
    thread.join(limit_s)


def _is_failure(exception: BaseException) -> bool:
    """Whether the other ranks have to be told: a timeout they see by themselves."""
    return isinstance(exception, Exception) and not isinstance(exception, StoppedBySignal) and not is_timeout(exception)
