"""A model and its data for runs by command line in which something goes wrong: pass by class path."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from commands import local_rank_of
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric
from training import Mlp, make_data

from gradsync.comm.server.collective import CollectivePeers
from gradsync.restarts import Restart
from gradsync.strategies.worker_return import INCARNATION

KILLED_AT = "killed at monotonic second "
AGAIN_AT = "training again at monotonic second "


def is_restarted() -> bool:
    return Restart.this() is not None


def _process_of(local_rank: int) -> int:
    """A process of this run on this host: started beside this one, or the one that started it."""
    siblings = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    return next((int(pid) for pid in siblings if local_rank_of(int(pid)) == str(local_rank)), os.getppid())


WORKERS, VICTIM = 3, 2
EPOCHS_AFTER = 2
"""How many epochs :class:`Returning` goes on for when all workers are there again."""


class FaultyMlp(Mlp):
    """Does what ``fault`` says in training step ``at_step`` of the process with ``LOCAL_RANK == process``.

    Args:
        fault: ``raise``, ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``memory``, ``kill_server``, ``kill_in_exchange``
            (SIGKILL after the step was announced to the parameter server, before its gradients are there),
            ``kill_once``, ``kill_server_once`` (SIGKILL at this step of the run, but not after a restart),
            ``leave_process`` (start one that nobody ends) or ``none``.
        process: Rank among all processes, the parameter server's included.
        at_step: Training step, from 0.
        server: The one to kill, by SIGKILL, under ``kill_server``.
    """

    def __init__(self, fault: str = "none", process: int = 1, at_step: int = 3, server: int = 0) -> None:
        super().__init__()
        self.server = server
        self.fault, self.process, self.at_step = fault, process, at_step

    def on_train_start(self) -> None:
        if "GRADSYNC_SUPERVISED" in os.environ:  # Lightning's observer would take what the supervisor goes by
            assert "child-process-observer" not in {thread.name for thread in threading.enumerate()}
        if is_restarted() and self.trainer.is_global_zero:
            print(f"{AGAIN_AT}{time.monotonic()}", flush=True)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        is_once = self.fault in ("kill_once", "kill_server_once")
        again = is_once and (is_restarted() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
        reached = (self.trainer.global_step if is_once else index) == self.at_step
        if self.fault != "none" and not again and reached and os.environ.get("LOCAL_RANK", "0") == str(self.process):
            self._fail()
        return super().training_step(batch, index)

    def _fail(self) -> None:
        if self.fault == "raise":
            raise ArithmeticError("boom in training")
        if self.fault == "memory":
            torch.empty(2**60)
        if self.fault == "kill_in_exchange":
            CollectivePeers.push_pull = self._kill  # pyright: ignore[reportAttributeAccessIssue]
            return
        if self.fault in ("kill_server", "kill_server_once"):
            print(f"{KILLED_AT}{time.monotonic()}", flush=True)
            os.kill(_process_of(self.server), signal.SIGKILL)
            return
        if self.fault == "leave_process":
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            return
        print(f"{KILLED_AT}{time.monotonic()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP if self.fault == "stop" else signal.SIGKILL)

    @staticmethod
    def _kill(*_: Any) -> None:
        time.sleep(0.5)  # by now the others wait in the collective
        # The supervisor looks last: nobody else may have taken what it names the failed one by.
        supervisor = os.environ["GRADSYNC_SUPERVISED"]
        os.kill(int(supervisor), signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {supervisor}"], start_new_session=True)
        print(f"{KILLED_AT}{time.monotonic()}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class FaultyOnImages(FaultyMlp):
    """The same on images of 8 x 8 pixels in 10 classes."""

    def __init__(self, fault: str = "none", process: int = 1, at_step: int = 3, server: int = 0) -> None:
        super().__init__(fault, process, at_step, server)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 10))


class TinyData(pl.LightningDataModule):
    """480 points of 10 numbers in 3 classes."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(make_data(), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(make_data(64), batch_size=self.batch_size)


class Returning(Mlp):
    """The last worker kills itself in its second step. Goes on for some epochs after all have counted it in again."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.ranks = CatMetric()
        self.present: list[int] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_rank == VICTIM and INCARNATION not in os.environ and self.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.ranks.update(torch.tensor([float(self.global_rank)]))

    def on_validation_epoch_end(self) -> None:
        state = torch.cat([value.double().flatten() for value in self.state_dict().values()])
        assert (self.all_gather(state) == state).all(), "workers evaluate different models"
        self.present.append(len(self.ranks.compute().unique()))
        self.ranks.reset()

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.present[-EPOCHS_AFTER:] == [WORKERS] * EPOCHS_AFTER
