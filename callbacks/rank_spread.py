"""The fastest and the slowest rank: what a mean over steps looks like on each of them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from .step_breakdown import StepBreakdown

SPREAD_FIGURES = {"exposed_ms": "comm/exposed_ms", "compute_ms": "time/compute_ms", "data_ms": "time/data_ms"}
"""Figures of :class:`.StepBreakdown` that tell ranks apart, and their TensorBoard tags."""


def rank_spread(trainer: pl.Trainer, mean: StepBreakdown) -> dict[str, tuple[float, float]]:
    """Smallest and largest value over ranks of each of :data:`SPREAD_FIGURES`; blocks, called on all ranks."""
    own = torch.tensor([getattr(mean, name) for name in SPREAD_FIGURES], dtype=torch.float64)
    ranks = gather(trainer, own.to(trainer.strategy.root_device)).reshape(-1, len(SPREAD_FIGURES)).cpu()
    low, high = ranks.min(dim=0).values.tolist(), ranks.max(dim=0).values.tolist()
    return dict(zip(SPREAD_FIGURES, zip(low, high, strict=True), strict=True))


def gather(trainer: pl.Trainer, own: Tensor) -> Tensor:
    """The ranks' tensors, one after another; blocks, called on all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(own)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)  # Lightning's way there is one that torch deprecates, aloud
    return torch.stack(ranks)


def may_exchange(trainer: pl.Trainer) -> bool:
    """Whether ranks may talk to each other in mid-epoch: not where they go at different paces."""
    return trainer.world_size > 1 and bool(getattr(trainer.strategy, "in_lockstep", True))
