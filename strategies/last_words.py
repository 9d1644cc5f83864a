"""What a run ends with, from the trainer of the first worker to that of the process that the user started."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn


def last_words(trainer: pl.Trainer, result: Any) -> dict[str, Any]:
    """First worker: metrics, checkpoint paths and ``result`` of the run; JSON-compatible."""
    checkpoints = [callback.state_dict() for callback in trainer.checkpoint_callbacks]
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "checkpoints": [{k: s.get(k) for k in ("best_model_path", "last_model_path")} for s in checkpoints],
        "result": result if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING) else None,
    }


def take_over(trainer: pl.Trainer, words: dict[str, Any]) -> Any:
    """Server: leave ``trainer`` as the first worker's was; returns the result."""
    metrics = {name: torch.tensor(value) for name, value in words["metrics"].items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    for callback, paths in zip(trainer.checkpoint_callbacks, words["checkpoints"], strict=True):
        vars(callback).update({name: path for name, path in paths.items() if path is not None})
    return words["result"]
