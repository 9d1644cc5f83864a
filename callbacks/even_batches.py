"""Ranks with different numbers of batches: refused, where DDP would pair the steps of different epochs, or hang."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..errors import UserError
from .run_store import exchange, lost_ranks, steps_together

_START_PATIENCE = timedelta(seconds=60)
_DEFAULT_STEP_TIMEOUT = timedelta(seconds=300)


@final
class EvenBatches(Callback):
    """Compares the ranks' numbers of training batches, under every strategy whose ranks go in lockstep.

    Before an epoch, where loaders know their length; and after it, before anything is reduced, where they do not: ranks
    that go on wait in vain then, until their own limit or ours. First among the callbacks.

    Raises:
        UserError: with the numbers, on all ranks that are there.
    """

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _applies(trainer):
            return
        counts = exchange(
            trainer, str(trainer.num_training_batches), _START_PATIENCE, f"batches of epoch {trainer.current_epoch}"
        )
        if len(set(counts.values())) > 1:
            numbers = ", ".join(f"{count} on rank {rank}" for rank, count in sorted(counts.items()))
            least = min(float(count) for count in counts.values())
            raise UserError(
                f"ranks have different numbers of training batches ({numbers}), and would wait for each other in vain: "
                f"give all as many (a DistributedSampler does), or use --trainer.limit_train_batches {least:g}"
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _applies(trainer) or trainer.num_training_batches != float("inf"):
            return
        patience: timedelta = getattr(trainer.strategy, "step_timeout", _DEFAULT_STEP_TIMEOUT)
        own = trainer.fit_loop.epoch_loop.batch_idx + 1
        counts = exchange(trainer, str(own), patience, f"end of epoch {trainer.current_epoch}")
        others = {rank: count for rank, count in counts.items() if count != str(own)}
        missing = sorted(set(range(trainer.world_size)) - counts.keys() - lost_ranks(trainer.strategy))
        if others or missing:
            what = ", ".join([*(f"{count} on rank {rank}" for rank, count in others.items()), *map(_later, missing)])
            raise UserError(
                f"the training data of rank {trainer.global_rank} ended after {own} batches: {what}. Give all ranks as "
                "many, or limit them with --trainer.limit_train_batches"
            )


def _later(rank: int) -> str:
    return f"rank {rank} goes on"


def _applies(trainer: Any) -> bool:
    return trainer.world_size > 1 and steps_together(trainer.strategy) and not trainer.should_stop
