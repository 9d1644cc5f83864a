"""Progress where output is no terminal: plain lines, readable in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import Tensor
from typing_extensions import override

from .communication_monitor import monitor_of
from .step_breakdown import RunningMean, StepBreakdown
from .throughput_progress_bar import ThroughputProgressBar
from .training_loss import training_loss

_FINE_BELOW_MS = 20.0
"""Steps shorter than this are shown with one decimal."""


def default_progress_callbacks(every_n_steps: int | None = None) -> list[Callback]:
    """A bar where standard output is a terminal, else lines. Give neither where the user wants no progress."""
    return [ThroughputProgressBar() if sys.stdout.isatty() else LineProgress(every_n_steps)]


@final
class LineProgress(ProgressBar):
    """Prints on rank zero, in place of a progress bar, a line every `every_n_steps` steps and after every epoch.

    ``epoch 1 step 50/125 loss 2.01 | 410 img/s | step 78 ms = data 4 + compute 51 + exposed comm 20 + optimizer 3``

    Figures are means since the last line; they need a CommunicationMonitor before this callback. Reading the loss
    waits for its device, once per line.

    Args:
        every_n_steps: Optimizer steps from line to line; by default the Trainer's ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._reset()

    def _reset(self) -> None:
        self._seen: StepBreakdown | None = None
        self._window = RunningMean()
        self._epoch_durations_s: list[float] = []
        self._validated = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        self._epoch_started_s = time.monotonic()  # a fit resumed in mid-epoch begins without an epoch's start

    # -- steps -----------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitor = monitor_of(trainer)
        if monitor and monitor.last_step and monitor.last_step is not self._seen:
            self._seen = monitor.last_step
            self._window.add(self._seen)
        num_batches, accumulate = batch_idx + 1, trainer.accumulate_grad_batches
        step = math.ceil(num_batches / accumulate)
        ends_step = num_batches % accumulate == 0 or num_batches == self.total_train_batches
        every = self.every_n_steps or trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self._enabled and ends_step and every and step % every == 0:
            window, self._window = self._window.mean(), RunningMean()
            loss = training_loss(trainer, outputs)
            total = self.total_train_batches / accumulate
            of = f"/{math.ceil(total)}" if math.isfinite(total) else ""
            self.print(
                f"epoch {trainer.current_epoch + 1} step {step}{of}"
                + (f" loss {loss.item():.4g}" if loss is not None else "")
                + (f" | {window.images_per_s:.0f} img/s | {format_step(window)}" if window else "")
            )

    # -- epochs ----------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started_s = time.monotonic()
        self._validated = False

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics  # on every rank: computing a metric can be collective
        self._epoch_durations_s.append(time.monotonic() - self._epoch_started_s)
        if self._enabled:
            self.print(self._epoch_line(trainer, metrics))

    def _epoch_line(self, trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> str:
        epoch, last = trainer.current_epoch + 1, _last_epoch(trainer)
        monitor = monitor_of(trainer)
        mean = monitor.epoch_summary() if monitor else None
        names = {"loss": "train/loss_epoch", "top-1": "train/top1"}
        validation = {"loss": "val/loss", "top-1": "val/top1", "top-5": "val/top5"} if self._validated else {}
        parts = [
            _figures("train", names, metrics),
            _figures("val", validation, metrics),
            f"{mean.images_per_s:.0f} img/s" if mean else "",
            _duration(self._epoch_durations_s[-1]) + self._time_left(epoch, last),
        ]
        of = f"/{last}" if last > 0 else ""
        return f"epoch {epoch}{of} done | {' | '.join(part for part in parts if part)}"

    def _time_left(self, epoch: int, last: int) -> str:
        if last <= epoch:
            return ""
        mean_s = sum(self._epoch_durations_s) / len(self._epoch_durations_s)
        return f", about {_duration((last - epoch) * mean_s)} left"

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        print(*args, **{"flush": True, **kwargs})


def _last_epoch(trainer: pl.Trainer) -> int:
    """The epoch that training ends with, from 1; -1 where no limit is set."""
    limits = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs > 0 else []
    steps_per_epoch = trainer.global_step / (trainer.current_epoch + 1)
    if trainer.max_steps > 0 and steps_per_epoch > 0:
        limits.append(math.ceil(trainer.max_steps / steps_per_epoch))
    return min(limits, default=-1)


def format_step(step: StepBreakdown) -> str:
    """``step 78 ms = data 4 + compute 51 + ...``: rounded so that the parts shown add up to the step shown."""
    decimals = 0 if step.step_ms >= _FINE_BELOW_MS else 1
    parts = {
        "data": round(step.data_ms, decimals),
        "compute": round(step.compute_ms, decimals),
        "exposed comm": round(step.exposed_ms, decimals),
        "optimizer": round(step.optimizer_ms, decimals),
    }
    if step.other_ms >= 1.0:
        parts["other"] = round(step.other_ms, decimals)
    shown = " + ".join(f"{name} {value:.{decimals}f}" for name, value in parts.items())
    return f"step {sum(parts.values()):.{decimals}f} ms = {shown}"


def _figures(label: str, names: Mapping[str, str], metrics: Mapping[str, Tensor]) -> str:
    shown = []
    for short, name in names.items():
        if name in metrics:
            value = float(metrics[name])
            shown.append(f"{short} {value:.4g}" if short == "loss" else f"{short} {value:.1f} %")
    return f"{label} {', '.join(shown)}" if shown else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
