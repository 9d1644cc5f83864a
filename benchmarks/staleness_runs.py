"""The trainings of `staleness.py`: one process of a parameter server's group, the first of which serves."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any, final

import lightning.pytorch as pl
import torch
from harness import Process
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader
from training_rows import Classifier, Workload
from typing_extensions import override

from gradsync.callbacks import CommunicationMonitor
from gradsync.datamodules import ImageNetDataModule
from gradsync.modules import ImageClassifier
from gradsync.strategies import ParameterServerStrategy

_IMAGE_SIZE = 32
_CALIBRATION_STEPS = 10


def compute_s(arch: str, batch_size: int) -> float:
    """How long the forward and backward pass of a batch take a process that has the machine for itself."""
    _quiet()
    workload = Workload(arch, _IMAGE_SIZE, batch_size, warmup=0, turns=1, steps_per_turn=_CALIBRATION_STEPS)
    network, samples = workload.network(), []
    for images, labels in workload.batches(0):
        network.zero_grad()
        before = time.perf_counter()
        cross_entropy(network(images), labels).backward()
        samples.append(time.perf_counter() - before)
    return statistics.median(samples)


@final
class SlowWorker(Callback):
    """The last worker sleeps ``sleep_s`` seconds after every backward pass.

    Args:
        warmup: First steps in which it does not.
    """

    def __init__(self, sleep_s: float, warmup: int = 0) -> None:
        self._sleep_s = sleep_s
        self._warmup = warmup

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step >= self._warmup:
            time.sleep(self._sleep_s)


@final
class Recorder(Callback):
    """Keeps when each step of this worker ended and how stale its gradient was, and the accuracies.

    Args:
        monitor: Stands before this one among the callbacks.
    """

    def __init__(self, monitor: CommunicationMonitor) -> None:
        self._monitor = monitor
        self.at_ends: list[float] = []
        """By a clock that all processes of this machine have in common."""
        self.staleness: list[float] = []
        self.top1_pct: list[float] = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.at_ends.append(time.monotonic())
        step = self._monitor.last_step
        self.staleness.append((step.staleness if step is not None else None) or 0.0)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.top1_pct.append(float(trainer.callback_metrics["val/top1"]))


def _trainer(processes: int, mode: dict[str, Any], callbacks: list[Callback], **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ParameterServerStrategy(server_log_every_n_steps=0, **mode),
        callbacks=callbacks,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _quiet() -> None:
    warnings.filterwarnings("ignore")  # hints of Lightning about loaders and ranks
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


@final
@dataclass(frozen=True)
class Speed:
    """One epoch of random images that are in memory, so that nobody meets between the steps."""

    mode: dict[str, Any]
    """Options of the strategy."""
    arch: str
    batch_size: int
    warmup: int
    num_steps: int
    sleep_s: float
    """Of the slow worker, in every step after the warm-up."""

    def run(self, process: Process) -> dict[str, Any] | None:
        """When the steps of a worker ended, the first ``warmup`` + 1 included; None from the server."""
        _quiet()
        workload = Workload(
            self.arch, _IMAGE_SIZE, self.batch_size, self.warmup, turns=1, steps_per_turn=self.num_steps
        )
        monitor = CommunicationMonitor(self.warmup)
        recorder = Recorder(monitor)
        callbacks = [monitor, recorder, SlowWorker(self.sleep_s, self.warmup)]
        trainer = _trainer(process.size, self.mode, callbacks, max_epochs=1, use_distributed_sampler=False)
        loader: Any = DataLoader(workload.batches(process.index), batch_size=None)  # pyright: ignore[reportArgumentType]
        trainer.fit(Classifier(workload.network()), loader)
        return {"at_ends": recorder.at_ends, "staleness": recorder.staleness} if process.index else None


@final
@dataclass(frozen=True)
class Accuracy:
    """A fit on the bundled images, validated after every epoch."""

    mode: dict[str, Any]
    """Options of the strategy."""
    arch: str
    batch_size: int
    num_epochs: int
    limit_batches: int | None
    lr: float
    sleep_s: float
    """Of the slow worker, in every step."""
    seed: int

    def run(self, process: Process) -> dict[str, float] | None:
        """Best top-1 in percent, and the mean staleness of this worker's gradients; None from the server."""
        _quiet()
        pl.seed_everything(self.seed, verbose=False)
        monitor = CommunicationMonitor()
        recorder = Recorder(monitor)
        callbacks = [monitor, recorder, SlowWorker(self.sleep_s)]
        limits = {f"limit_{stage}_batches": self.limit_batches or 1.0 for stage in ("train", "val")}
        trainer = _trainer(process.size, self.mode, callbacks, max_epochs=self.num_epochs, **limits)
        module = ImageClassifier(
            self.arch, optimizer=lambda params: AdamW(params, lr=self.lr, weight_decay=0.01, fused=True)
        )
        data = ImageNetDataModule(batch_size=self.batch_size, num_workers=0, image_size=_IMAGE_SIZE)
        trainer.fit(module, datamodule=data)
        if process.index == 0:
            return None
        return {"top1_pct": max(recorder.top1_pct), "staleness": statistics.fmean(recorder.staleness)}
