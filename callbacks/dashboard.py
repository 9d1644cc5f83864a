"""The TensorBoard dashboard: the same layout for every run, so that the runs of a comparison merge into one."""

from __future__ import annotations

from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from .rank_spread import SPREAD_FIGURES

# One tag per chart, colour = run = strategy; TensorBoard puts three charts in a row.
_CATEGORIES = {
    "Training": ["train/loss", "val/top1", "perf/images_per_s"],
    "Communication": ["comm/exposed_ms", "comm/total_ms", "comm/share_pct"],
    "Step": ["time/data_ms", "time/compute_ms", "time/optimizer_ms"],
    "System": ["perf/step_ms", "system/cpu_pct", "system/rss_mib"],
}


def layout() -> dict[str, dict[str, list[Any]]]:
    """For ``SummaryWriter.add_custom_scalars``: charts by category, then one of the fastest and slowest rank each."""
    charts = {name: {tag: ["Multiline", [f"^{tag}$"]] for tag in tags} for name, tags in _CATEGORIES.items()}
    ranks = {f"{tag}, rank 0 within min to max": _margin(tag) for tag in SPREAD_FIGURES.values()}
    return {**charts, "Ranks": ranks}


def _margin(tag: str) -> list[Any]:
    return ["Margin", [tag, f"{tag}_min", f"{tag}_max"]]


@final
class Dashboard(Callback):
    """Writes the layout into every TensorBoard run, on rank zero; the page is ``#custom_scalars``."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout())  # a no-op where rank is not zero
