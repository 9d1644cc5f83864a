"""The loss of one micro-batch, as ``training_step`` returned it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor


def training_loss(trainer: pl.Trainer, outputs: Any) -> Tensor | None:
    """From the `outputs` of ``on_train_batch_end``, detached and on its device; None where there is none.

    Lightning 2.6 hands over the loss divided by ``accumulate_grad_batches``
    (``ClosureResult.from_training_step_output``): this undoes it.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
