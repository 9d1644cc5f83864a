"""Where a run that fails goes on from when it is started again, and how much of it was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from ..restarts import Progress, Restart, plan_restarts
from .run_store import in_lockstep, steps_together

SNAPSHOT = "checkpoints/last-snapshot.ckpt"
"""In the run's folder: ``--ckpt_path last`` takes the newest file of the name ``last*``."""


@final
class Snapshots(Callback):
    """Saves a checkpoint every few steps, counts updates where a crash does not take them, plans restarts.

    For all training ranks. In lockstep all take part in a checkpoint; else the first worker writes it by itself, and
    the others go on meanwhile.

    Args:
        run_dir: Of the run.
        every_n_steps: Optimizer steps from one checkpoint to the next; 0 for none.
        max_restarts: How often the supervisor may start the run again. With 0 nothing is counted.
    """

    def __init__(self, run_dir: Path, every_n_steps: int = 0, max_restarts: int = 0) -> None:
        self._run_dir = run_dir
        self._every = every_n_steps
        self._max_restarts = max_restarts
        self._progress: Progress | None = None
        self._restored = 0
        self._at_start = self._global_step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_start = self._global_step = trainer.global_step
        if self._max_restarts == 0:
            return
        self._progress = Progress()
        if trainer.is_global_zero:
            self._progress.begin(self._restored)
            plan_restarts(self._max_restarts, self._run_dir)
            if restart := Restart.this():
                rank_zero_info(_told(restart, self._restored))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._global_step = self._global_step, trainer.global_step
        if self._progress is not None:
            self._progress.note(self._updates(trainer))
        if self._every and before // self._every < self._global_step // self._every:
            self._save(trainer)

    def _updates(self, trainer: pl.Trainer) -> int:
        """Since this run began, as far as this rank knows: those of others count where they step by themselves."""
        own = trainer.global_step - self._at_start
        return own if steps_together(trainer.strategy) else getattr(trainer.strategy, "num_updates", own)

    def _save(self, trainer: pl.Trainer) -> None:
        path = self._run_dir / SNAPSHOT
        if in_lockstep(trainer.strategy):
            trainer.save_checkpoint(path, weights_only=False)
        elif trainer.is_global_zero:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, path)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["gradsync_updates"] = self._restored + self._updates(trainer)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("gradsync_updates", checkpoint["global_step"])


def _told(restart: Restart, restored: int) -> str:
    lost = restart.updates - restored
    return (
        f"restart {restart.number} of {restart.of}: goes on after update {restored}; "
        f"{lost} of {restart.updates} updates are lost"
    )
