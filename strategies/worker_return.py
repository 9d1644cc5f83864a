"""Another process takes the place of a lost worker.

Phases, each a key in the store of the run that names the new process (worker and incarnation):

1. *asks*: it has loaded everything and wants to train;
2. *position*: worker 0 has written where it stands at the end of a step (a checkpoint); its next push tells the servers
   from which step on the new process takes part;
3. *returns*: the new process has trained to the end of that epoch, with nobody but the servers to agree with, and
   begins the next one;
4. *member*: worker 0 has seen that, at the start of the same epoch, and all workers count it in from now on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from ..comm.server.ledger import identity
from ..errors import UserError
from ..processes import make_private_folder
from .store_control_plane import StoreControlPlane
from .worker_loss import LostWorkers

INCARNATION = "GRADSYNC_INCARNATION"
"""Of the worker that a process is: how many were it before."""
_PAUSE_S = 0.02


def incarnation() -> int:
    """Of this process; 0 but for one that takes a lost worker's place."""
    return int(os.environ.get(INCARNATION, "0"))


def ask_for_position(store: dist.Store, rank: int, patience: timedelta) -> str:
    """New process: the checkpoint to begin from; blocks until worker 0 has ended a step.

    Raises:
        UserError: it does not within ``patience``, or has no room to write.
    """
    name = identity(rank, incarnation()).decode()
    store.set(f"asks {name}", "yes")
    try:
        store.wait([f"position {name}"], patience)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"worker 0 has ended no step within {patience.total_seconds():g} s, so worker {rank} cannot return; "
            "--trainer.strategy.step_timeout_s raises the limit"
        ) from error
    if not (path := store.get(f"position {name}").decode()):
        raise UserError(f"worker {rank} cannot return: worker 0 cannot write where it is, see its warning")
    return path


@final
class WorkerReturn(Callback):
    """A worker's part in it; the strategy puts it before all other callbacks.

    Args:
        store: Of the run.
        rank: This worker's.
        lost: Keeps up with losses.
        control: Of the workers. A new process has it from phase *member* on.
        admit: Worker 0: tells the servers with the next push.
        join: New process: the others count it in.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        lost: LostWorkers,
        control: StoreControlPlane,
        admit: Callable[[int], None],
        join: Callable[[], None],
    ) -> None:
        self._store = store
        self._rank = rank
        self._lost = lost
        self._control = control
        self._admit = admit
        self._join = join
        self.is_member = incarnation() == 0
        self._members: dict[int, int] = {}
        """Incarnations of the workers that are counted in, where they are not 0."""
        self._let_in: dict[int, int] = {}
        """Worker 0: of those that train, and are not counted in yet."""
        self._global_step = 0
        self._folder: Path | None = None

    def lost_ranks(self) -> set[int]:
        """Workers that are not counted in."""
        losses = self._lost.losses()
        return {loss.worker for loss in losses if loss.incarnation >= self._members.get(loss.worker, 0)}

    # -- phase: position -------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._global_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._global_step = trainer.global_step > self._global_step, trainer.global_step
        if self._rank > 0 or not stepped or trainer.is_last_batch:
            return
        for worker in self.lost_ranks():
            number = max(loss.incarnation for loss in self._lost.losses() if loss.worker == worker) + 1
            name = identity(worker, number).decode()
            if self._let_in.get(worker) != number and self._store.check([f"asks {name}"]):
                self._let_in[worker] = number
                path = self._write_position(trainer, name.replace("/", "-"))
                self._store.set(f"position {name}", str(path or ""))
                if path is not None:
                    self._admit(worker)

    def _write_position(self, trainer: pl.Trainer, name: str) -> Path | None:
        """None if there is no room: that costs the new process, and not the run."""
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            self._folder = self._folder or make_private_folder("return")
            path = self._folder / f"{name}.ckpt"
            torch.save(checkpoint, path)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
            rank_zero_warn(f"worker {name} cannot return: its position cannot be written ({error})")
            return None
        return path

    # -- phases: returns, member -----------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_member:
            self._count_in()
        else:
            self._return()

    def _count_in(self) -> None:
        """All that are counted in agree on whom else they count in."""
        mine = self._returned() if self._rank == 0 else {}
        returned = json.loads(self._control.all_gather_bytes(json.dumps(list(mine.items())).encode())[0])
        for worker, number in returned:
            self._members[worker] = number
            self._control.count_in(worker)
        for worker, number in mine.items():
            self._let_in.pop(worker)
            where = {"number": self._control.number, "members": list(self._members.items())}
            self._store.set(f"member {identity(worker, number).decode()}", json.dumps(where))

    def _returned(self) -> dict[int, int]:
        """Of those that were let in, who has come to this epoch; blocks until each has, or is lost again."""
        returned: dict[int, int] = {}
        for worker, number in list(self._let_in.items()):
            if self.await_one(worker, number, f"returns {identity(worker, number).decode()}"):
                returned[worker] = number
            else:
                self._let_in.pop(worker)
        return returned

    def await_one(self, worker: int, number: int, key: str) -> bool:
        """Whether this process sets ``key``; blocks until it has, or is lost."""
        while not self._store.check([key]):
            if any(loss.worker == worker and loss.incarnation >= number for loss in self._lost.losses()):
                return False
            time.sleep(_PAUSE_S)
        return True

    def _return(self) -> None:
        name = identity(self._rank, incarnation()).decode()
        self._store.set(f"returns {name}", "yes")
        while not self._store.check([f"member {name}"]):
            self._control.check_stopped()
            time.sleep(_PAUSE_S)
        where = json.loads(self._store.get(f"member {name}"))
        self._members = dict(where["members"])
        self._control.begin_at(where["number"], self.lost_ranks())
        self.is_member = True
        self._join()

    # -- counting --------------------------------------------------------------------------------------------

    def tell_samples(self, count: int) -> None:
        """New process that is not counted in: what it has trained on so far, for the report."""
        self._store.set(f"samples {identity(self._rank, incarnation()).decode()}", str(count))

    def samples_of_others(self) -> dict[tuple[int, int], int]:
        """Worker 0: of those that train and are not counted in, by worker and incarnation; blocks until they say so."""
        keys = {(w, n): f"samples {identity(w, n).decode()}" for w, n in self._let_in.items()}
        return {one: int(self._store.get(key)) for one, key in keys.items() if self.await_one(*one, key)}

    def close(self) -> None:
        """The fit has ended."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder)
