"""A worker's part in a run that goes on without lost workers: it says that it lives, and knows who is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import final

import lightning.pytorch as pl
import torch.distributed as dist

from ..comm.server import ServersClient
from ..comm.server.ledger import Loss
from .control_plane import ControlPlane
from .store_control_plane import StoreControlPlane
from .worker_loss import Heartbeat, LostWorkers
from .worker_return import INCARNATION, WorkerReturn, incarnation


@final
class Continuation:
    """Of one run; :meth:`agree_through` follows as soon as there is a control plane.

    Args:
        store: Of the run.
        rank: This worker's.
        num_workers: How many there were at first.
    """

    def __init__(self, store: dist.Store, rank: int, num_workers: int) -> None:
        self._store = store
        self._rank = rank
        self._num_workers = num_workers
        self._lost = LostWorkers(store, num_workers)
        self._heartbeat = Heartbeat(store, rank, incarnation())
        self._return: WorkerReturn | None = None
        self._counted: dict[tuple[int, int], int] = {}

    def agree_through(self, control: StoreControlPlane, admit: Callable[[int], None], join: Callable[[], None]) -> None:
        """See :class:`.WorkerReturn`."""
        self._return = WorkerReturn(self._store, self._rank, self._lost, control, admit, join)

    def attach(self, trainer: pl.Trainer) -> None:
        """Before all other callbacks: a new process is counted in first thing in an epoch."""
        trainer.callbacks.insert(0, self._return)  # pyright: ignore[reportAttributeAccessIssue]

    def detach(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback | None] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if self._return in callbacks:
            callbacks.remove(self._return)

    def losses(self) -> list[Loss]:
        """Workers that the run has gone on without."""
        return self._lost.losses()

    def lost_ranks(self) -> set[int]:
        """Workers that this one does not agree with on anything: lost ones, and new processes not counted in yet."""
        if self._return is not None and not self._return.is_member:
            return set(range(self._num_workers)) - {self._rank}
        return self._return.lost_ranks() if self._return is not None else set()

    def samples_since_last_call(self, client: ServersClient, control: ControlPlane) -> int:
        """How many all workers have trained on, lost ones included as far as they pushed; blocks, called on all."""
        own = f"{self._rank} {incarnation()} {client.num_samples}".encode()
        said = [tuple(map(int, data.split())) for data in control.all_gather_bytes(own)]
        counts = {(rank, number): count for rank, number, count in said}
        assert self._return is not None
        if not self._return.is_member:
            self._return.tell_samples(client.num_samples)
        elif self._rank == 0:
            counts |= self._return.samples_of_others()
        counts |= {(loss.worker, loss.incarnation): loss.samples for loss in self.losses()}
        before, self._counted = self._counted, counts
        return sum(count - before.get(one, 0) for one, count in counts.items())

    def close(self) -> None:
        """The fit has ended; :meth:`losses` still tells what was known. Later runs begin anew."""
        os.environ.pop(INCARNATION, None)
        self._heartbeat.stop()
        self._lost.close()
        if self._return is not None:
            self._return.close()
