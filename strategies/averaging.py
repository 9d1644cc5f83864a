"""Callbacks that swap a worker's weights for an average of them, and where that cannot work."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from ..errors import UserError


def refuse_averaging(trainer: pl.Trainer, options: str, remedy: str) -> None:
    """Raise UserError if a fit averages weights, which does not go with ``options`` of its strategy."""
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    averaging = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    if averaging and trainer.state.fn == TrainerFn.FITTING:
        raise UserError(f"{options} does not work with {type(averaging[0]).__name__}: {remedy}")
