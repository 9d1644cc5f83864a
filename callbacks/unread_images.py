"""Which images of a run could not be read, over all ranks: for data modules that skip them and keep count."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from .rank_spread import gather

_MOST_NAMED = 20


def unread_images(trainer: pl.Trainer) -> dict[str, Any]:
    """``count``, and ``first``: names of the first few. Empty where the data module keeps no count.

    Blocks; called on all ranks. A data module that does has ``bad_sample_flags() -> Tensor | None``, (N,) uint8 and
    as long on every rank, and ``sample_name(index) -> str``.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    flags = getattr(datamodule, "bad_sample_flags", lambda: None)()
    if flags is None:
        return {}
    if trainer.world_size > 1:
        flags = gather(trainer, flags.to(trainer.strategy.root_device)).reshape(-1, len(flags)).amax(dim=0).cpu()
    found = flags.nonzero().flatten().tolist()
    return {"count": len(found), "first": [datamodule.sample_name(index) for index in found[:_MOST_NAMED]]}
