"""A model and its data for runs by command line in which something goes wrong: pass by class path."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from training import Mlp, make_data

from gradsync.comm.server.collective import CollectivePeers


class FaultyMlp(Mlp):
    """Does what ``fault`` says in training step ``at_step`` of the process with ``LOCAL_RANK == process``.

    Args:
        fault: ``raise``, ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``memory``, ``kill_in_exchange`` (SIGKILL after the
            step was announced to the parameter server, before its gradients are there) or ``none``.
        process: Rank among all processes, the parameter server's included.
        at_step: Training step, from 0.
    """

    def __init__(self, fault: str = "none", process: int = 1, at_step: int = 3) -> None:
        super().__init__()
        self.fault, self.process, self.at_step = fault, process, at_step

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.fault != "none" and index == self.at_step and os.environ.get("LOCAL_RANK", "0") == str(self.process):
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
        os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)

    @staticmethod
    def _kill(*_: Any) -> None:
        time.sleep(0.5)  # by now the others wait in the collective
        print(f"killed at {time.time()}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class TinyData(pl.LightningDataModule):
    """480 points of 10 numbers in 3 classes."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(make_data(), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(make_data(64), batch_size=self.batch_size)
