"""What a classifier is judged by, per epoch and over all ranks. Updates synchronize no device and no rank."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override


@final
class PercentCorrect(MulticlassAccuracy):
    """Share of all samples, in percent, whose class is among the ``top_k`` likeliest."""

    def __init__(self, num_classes: int, top_k: int = 1) -> None:
        # Micro: every sample counts the same. Checking the arguments would synchronize the device.
        super().__init__(num_classes, top_k=min(top_k, num_classes), average="micro", validate_args=False)

    @override
    def compute(self) -> Tensor:
        return 100 * super().compute()


@final
class MeanLoss(Metric):
    """Mean over all samples, also where ranks have different numbers of them.

    Lightning's ``sync_dist`` is off there: it averages the integer counts of the ranks and drops the fraction.
    """

    full_state_update = False
    total: Tensor
    num_samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, mean: Tensor, num_samples: int) -> None:
        """Take the mean loss of a batch and the batch's size."""
        self.total += mean * num_samples
        self.num_samples += num_samples

    @override
    def compute(self) -> Tensor:
        return self.total / self.num_samples
