"""Lightning's Trainer with a ``strategy`` argument that the command line can fill with options."""

from __future__ import annotations

from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy


@final
class Trainer(pl.Trainer):
    """Exactly Lightning's Trainer; only the annotation of ``strategy`` differs.

    jsonargparse tries the members of a union in order. With Lightning's ``str | Strategy`` everything is a
    string, so a class path without options is refused (https://github.com/Lightning-AI/pytorch-lightning/issues/19682).
    """

    def __init__(self, *, strategy: Strategy | str = "auto", **kwargs: Any) -> None:
        super().__init__(strategy=strategy, **kwargs)
