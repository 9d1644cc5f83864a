"""A small model, and its data, in which something goes wrong: for `faults.py`, which gives them by class path.

Knows Lightning only, so that plain Lightning trains the very same. Every process notes the steps that it begins in a
file ``steps.LOCAL_RANK`` of the current folder, and rank 0 leaves its weights in ``weights.pt``.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

FAULT_AT = "fault at monotonic second "
"""Printed right before the fault, with the clock that all processes of a machine have in common."""
BATCH_SIZE = 8
NUM_CLASSES = 3
_NUM_FEATURES = 10


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def tell_fault() -> None:
    print(f"{FAULT_AT}{time.monotonic()}", flush=True)


@final
class FaultyMlp(pl.LightningModule):
    """Does what `fault` says in the process with ``LOCAL_RANK == process``, once the run has made `at_step` steps.

    Args:
        fault: ``kill``, ``kill_parent``, ``stop`` (SIGSTOP), ``raise``, ``nan`` (in the gradients); ``differs`` (the
            model's second layer, from the start); ``tell_start`` (nothing but the time at which it was made); ``none``.
        once: Not in a run that was started again, by torchrun or by gradsync.
        num_features: Of an input, flattened.
        num_more: Parameters that only make checkpoints larger.
        pace_s: Seconds that every step sleeps.
    """

    def __init__(
        self,
        fault: str = "none",
        process: int = 1,
        at_step: int = 5,
        once: bool = True,
        num_features: int = _NUM_FEATURES,
        num_more: int = 0,
        dropout: float = 0.0,
        pace_s: float = 0.0,
    ) -> None:
        super().__init__()
        again = "GRADSYNC_RESTART" in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.fault = fault if local_rank() == process and not (once and again) else "none"
        self.at_step, self.pace_s, self.tells_start = at_step, pace_s, fault == "differs"
        width = 33 if self.fault == "differs" else 32
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(num_features, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, NUM_CLASSES)
        )
        self.second = nn.Linear(width, NUM_CLASSES)
        self.more = nn.Parameter(torch.zeros(num_more))
        self._steps = open(f"steps.{local_rank()}", "a", buffering=1)  # noqa: SIM115 (until the process ends)
        if self.fault == "tell_start":
            tell_fault()

    @override
    def setup(self, stage: str) -> None:
        if self.tells_start:
            tell_fault()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        self._steps.write(f"{os.getpid()} {self.trainer.current_epoch} {step} {time.monotonic()}\n")
        time.sleep(self.pace_s)
        logits = self.net(batch[0])
        if self.fault != "none" and step == self.at_step:
            self._fail(logits)
        unused = self.second.weight.sum() + self.second.bias.sum() + self.more.sum()
        return nn.functional.cross_entropy(logits, batch[1]) + 1e-3 * unused

    def _fail(self, logits: Tensor) -> None:
        if self.fault == "nan":  # on its way to all parameters, before anything is exchanged; the loss stays as it is
            logits.register_hook(lambda gradient: gradient * float("nan"))
            return
        if self.fault != "differs":
            tell_fault()
        if self.fault == "raise":
            raise ArithmeticError("boom in training")
        if self.fault == "kill_parent":
            os.kill(os.getppid(), signal.SIGKILL)
        if self.fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    @override
    def on_train_end(self) -> None:
        if self.trainer.global_rank == 0:
            torch.save(self.state_dict(), "weights.pt")


@final
class TinyData(pl.LightningDataModule):
    """So many batches of random points in an epoch, on every rank.

    Args:
        num_fewer: Batches that rank 1 has less than the others; needs ``use_distributed_sampler=False``.
    """

    def __init__(self, steps_per_epoch: int = 20, num_fewer: int = 0) -> None:
        super().__init__()
        self.steps_per_epoch, self.num_fewer = steps_per_epoch, num_fewer

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        is_short = self.trainer.global_rank == 1
        parts = 1 if self.num_fewer else self.trainer.world_size
        num = BATCH_SIZE * parts * (self.steps_per_epoch - (self.num_fewer if is_short else 0))
        generator = torch.Generator().manual_seed(7)
        labels = torch.randint(0, NUM_CLASSES, (num,), generator=generator)
        points = torch.randn(num, _NUM_FEATURES, generator=generator) + labels[:, None]
        return DataLoader(TensorDataset(points, labels), batch_size=BATCH_SIZE, shuffle=not self.num_fewer)


def checkpoints(folder: str, every_n_steps: int | None) -> ModelCheckpoint:
    """Lightning's own: all of every `every_n_steps` steps, or ``last.ckpt`` and the newest two at ends of epochs."""
    if every_n_steps:
        return ModelCheckpoint(folder, every_n_train_steps=every_n_steps, save_top_k=-1)
    return ModelCheckpoint(
        folder, monitor="step", mode="max", save_top_k=2, save_last=True, save_on_train_epoch_end=True
    )
