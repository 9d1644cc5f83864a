"""Gives torchmetrics a way to gather states where there is no default process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn
from torchmetrics import Metric

_ATTRIBUTES = ("distributed_available_fn", "dist_sync_fn")


@final
class MetricSync:
    """Lets every ``Metric`` of a module gather its states by ``gather`` instead of torch's default group.

    Without it torchmetrics would take the process for the only one, and silently return its own share.
    """

    def __init__(self, gather: Callable[..., list[Tensor]]) -> None:
        self._gather = gather
        self._before: dict[Metric, tuple[Any, ...]] = {}

    def attach(self, module: nn.Module) -> None:
        """To all metrics of ``module`` that have no function of their own."""
        for metric in module.modules():
            if isinstance(metric, Metric) and metric not in self._before and metric.dist_sync_fn is None:
                self._before[metric] = tuple(getattr(metric, name) for name in _ATTRIBUTES)
                metric.distributed_available_fn = lambda: True
                metric.dist_sync_fn = self._gather

    def detach(self) -> None:
        """Leave the metrics as they were."""
        for metric, values in self._before.items():
            for name, value in zip(_ATTRIBUTES, values, strict=True):
                setattr(metric, name, value)
        self._before.clear()
