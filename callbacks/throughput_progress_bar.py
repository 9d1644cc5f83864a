"""Progress in a terminal: Lightning's Rich bar, with images/s."""

from __future__ import annotations

from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from .communication_monitor import monitor_of


@final
class ThroughputProgressBar(RichProgressBar):
    """Shows what the module logs with ``prog_bar=True``, and images/s over the current epoch.

    images/s needs a CommunicationMonitor among the callbacks.
    """

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        monitor = monitor_of(trainer)
        summary = monitor.epoch_summary() if monitor else None
        if summary:
            items["img/s"] = f"{summary.images_per_s:.0f}"
        return items
