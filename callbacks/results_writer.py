"""Writes a run's figures to one JSON file, after every epoch: what ``compare`` and ``report`` read."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..report.files import atomic_write_json
from ..report.methods import method_of, result_filename
from .communication_monitor import monitor_of
from .nonfinite_guard import NonfiniteGuard
from .rank_spread import rank_spread
from .results_record import SCHEMA_VERSION, average_communication, communication, describe_run, figure, summarize
from .run_environment import num_servers, run_environment, strategy_flag
from .samples_seen import lost_workers, samples_seen
from .step_breakdown import RunningMean, StepBreakdown
from .training_loss import training_loss
from .unread_images import unread_images


@final
class ResultsWriter(Callback):
    """Runs on all training ranks, since reading Lightning's metrics is collective; rank zero writes.

    The file is replaced in one step after every epoch, so a killed run leaves the epochs it finished; ``complete``
    becomes true when training ends in good order. A fit resumed from a checkpoint keeps the earlier epochs.
    Needs a :class:`CommunicationMonitor` among the callbacks, before this one.

    * ``all_losses``: rank zero's training loss of every optimizer step (mean of its micro-batches), kept as
      tensors and read once per epoch. A figure that is not finite becomes null: JSON knows no NaN.
    * ``train_loss``: mean of the epoch's losses in ``all_losses``. ``train_accuracy``: the metric ``train/top1``; null
      where a fit resumed from a checkpoint made after the epoch's last step but before its end.
    * ``train_time`` (s): all steps of the epoch, waiting for data included, validation and checkpoints left out.
    * ``train_throughput``, ``avg_batch_time``, ``avg_comm_time*`` and ``comm`` leave the monitor's warm-up out.
    * ``val_*`` are null for an epoch without validation.

    Args:
        dirpath: Folder of the file; by default the Trainer's ``default_root_dir``.
        filename: By default ``results_<stem of the strategy>.json``.
        variant: What tells this run from others of its strategy, such as ``mode=async+transport=tcp``. It becomes part
            of ``method`` (``Parameter Server (PS), mode async, transport tcp``), so that reports keep them apart.
    """

    def __init__(
        self, dirpath: str | Path | None = None, filename: str | None = None, variant: str | None = None
    ) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self.variant = variant or ""
        self.config: dict[str, Any] | None = None
        """The whole configuration of the run, for the file; the command line sets it."""
        self.path: Path | None = None
        """Where the file is or will be, from ``on_fit_start`` on."""
        self._reset()

    def _reset(self) -> None:
        self._start_time: str | None = None
        self._epochs: list[dict[str, Any]] = []
        self._all_losses: list[float] = []
        self._run = RunningMean()
        self._unread_images: dict[str, Any] = {}
        self._guard: NonfiniteGuard | None = None
        self._lost_workers: list[dict[str, Any]] = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._validation: dict[str, float | None] = {}
        self._epoch_losses: list[float] = []
        self._step_losses: list[Tensor] = []
        self._micro_losses: list[Tensor] = []
        self._stepped = False

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget other fits, unless the same Trainer goes on; a checkpoint's state is loaded after this.

        Raises: ValueError without a CommunicationMonitor.
        """
        if stage != "fit":
            return
        monitor = monitor_of(trainer)
        if monitor is None:
            raise ValueError(
                "ResultsWriter needs a CommunicationMonitor for its figures, got none: "
                "add gradsync.callbacks.CommunicationMonitor to --trainer.callbacks, before the ResultsWriter"
            )
        self._monitor = monitor
        if not self._epochs or len(self._epochs) != trainer.current_epoch:
            self._reset()
        self._guard = next((c for c in getattr(trainer, "callbacks", []) if isinstance(c, NonfiniteGuard)), None)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_time = self._start_time or _now()
        method = method_of(strategy_flag(trainer.strategy), self.variant)
        self.path = Path(self.dirpath or trainer.default_root_dir) / (self.filename or result_filename(method.stem))
        self._method = {"method": method.name, "strategy": method.strategy}
        if method.variant:
            self._method["variant"] = method.variant
        self._has_server = num_servers(trainer.strategy) > 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # now the loaders exist
            self._header = {"schema_version": SCHEMA_VERSION, **self._method, **describe_run(trainer)}
            self._environment = run_environment(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._epochs:
            self._lost_workers = lost_workers(trainer)
            self._write(complete=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and texts; the epoch so far as well, since checkpoints are also made inside epochs."""
        self._read_losses()
        return {
            "start_time": self._start_time,
            "epochs": list(self._epochs),
            "all_losses": list(self._all_losses),
            "epoch_losses": list(self._epoch_losses),
            "validation": self._validation,
            "run": self._run.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start_time = state_dict["start_time"]
        self._epochs = list(state_dict["epochs"])
        self._all_losses = list(state_dict["all_losses"])
        self._epoch_losses = list(state_dict["epoch_losses"])
        self._validation = state_dict["validation"]
        self._run.load_state_dict(state_dict["run"])

    # -- losses ----------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._stepped = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = training_loss(trainer, outputs) if trainer.is_global_zero else None
        if loss is not None:
            self._micro_losses.append(loss)
        if self._stepped and self._micro_losses:
            self._step_losses.append(torch.stack(self._micro_losses).float().mean())
            self._micro_losses = []
        self._stepped = False

    def _read_losses(self) -> None:
        """Move this epoch's losses off the device: the only wait for it in here."""
        if self._step_losses:
            self._epoch_losses += torch.stack(self._step_losses).tolist()
            self._step_losses = []

    # -- epochs ----------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_epoch()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics  # on every rank: computing a metric can be collective
        if not trainer.sanity_checking and trainer.is_global_zero:
            self._validation = {
                "val_loss": figure(metrics, "val/loss"),
                "val_accuracy": figure(metrics, "val/top1"),
            }

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics  # on every rank: computing a metric can be collective
        mean = self._monitor.epoch_summary()
        ranks = rank_spread(trainer, mean) if mean is not None and trainer.world_size > 1 else {}
        self._unread_images = unread_images(trainer)
        seen = samples_seen(trainer)
        if not trainer.is_global_zero:
            return
        self._lost_workers = lost_workers(trainer)
        self._read_losses()
        losses, self._epoch_losses = self._epoch_losses, []
        self._all_losses += losses
        self._epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                "train_loss": sum(losses) / len(losses) if losses else figure(metrics, "train/loss_epoch"),
                "train_accuracy": figure(metrics, "train/top1"),
                "val_loss": None,
                "val_accuracy": None,
                **self._validation,
                **seen,
                **self._step_figures(mean, ranks),
            }
        )
        self._write(complete=False)

    def _step_figures(self, mean: StepBreakdown | None, ranks: dict[str, tuple[float, float]]) -> dict[str, Any]:
        if mean is None:
            return {}
        measured_steps = self._monitor.epoch_measured_steps
        self._run.add(mean, warmup=measured_steps == 0)
        return {
            "train_time": self._monitor.epoch_wall_s,
            "train_throughput": mean.images_per_s,
            "avg_batch_time": mean.step_ms / 1000.0,
            **average_communication(mean, has_server=self._has_server),
            "comm": {**communication(mean), "measured_steps": measured_steps, "ranks": ranks},
        }

    def _write(self, *, complete: bool) -> None:
        assert self.path is not None
        mean = self._run.mean()
        summary = summarize(self._epochs)
        if mean is not None:
            summary |= average_communication(mean, has_server=self._has_server)
        content = {
            **self._header,
            "start_time": self._start_time,
            "end_time": _now(),
            "complete": complete,
            "warmup_steps": self._monitor.warmup_steps,
            "summary": summary,
            "epochs": self._epochs,
            "comm": None if mean is None else communication(mean),
            **({"bad_samples": self._unread_images} if self._unread_images else {}),
            **({"skipped_steps": self._guard.skipped} if self._guard and self._guard.on_nonfinite == "skip" else {}),
            **({"lost_workers": self._lost_workers} if self._lost_workers else {}),
            **_gpu_memory(),
            "environment": self._environment,
            "config": self.config,
            "all_losses": self._all_losses,
        }
        atomic_write_json(self.path, content)


def _gpu_memory() -> dict[str, int]:
    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {}


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")
