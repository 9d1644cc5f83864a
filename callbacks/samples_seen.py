"""What a run has really trained on, where workers may be lost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from .run_store import may_lose_workers


def samples_seen(trainer: pl.Trainer) -> dict[str, int]:
    """``samples_seen`` of the epoch that ends, over all workers; blocks, called on all ranks.

    Empty where no worker can be lost: then it is what samplers have drawn.
    """
    strategy: Any = trainer.strategy
    if not may_lose_workers(strategy):
        return {}
    return {"samples_seen": strategy.samples_since_last_call()}


def lost_workers(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The run has gone on without these: ``worker``, ``reason``, ``pushes`` and ``samples`` until then."""
    return [asdict(loss) for loss in getattr(trainer.strategy, "losses", list)()]
