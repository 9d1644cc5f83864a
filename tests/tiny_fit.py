"""A classifier that trains in milliseconds, and Trainers for it: for tests of callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class TinyClassifier(pl.LightningModule):
    """Logs under the names that callbacks read, as gradsync's own module does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        self.train_top1 = MulticlassAccuracy(num_classes=2, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes=2, average="micro")
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.losses.append(loss.item())
        self.train_top1(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.val_top1(logits, y)
        self.log("val/loss", nn.functional.cross_entropy(logits, y), on_epoch=True, sync_dist=True)
        self.log("val/top1", self.val_top1, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(num_samples: int, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch_size)


class TinyData(pl.LightningDataModule):
    """As gradsync's DataModules: says what it holds."""

    description = "points in a box (demo data, 2 classes)"
    class_names = ("below", "above")
    num_classes = 2
    is_demo = True
    batch_size = 4

    def __init__(self, num_train: int = 32) -> None:
        super().__init__()
        self.num_train = num_train

    def train_dataloader(self) -> DataLoader:
        return loader(self.num_train, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader(8, self.batch_size)


def make_trainer(folder: Path | str, callbacks: list[Any], **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 2,
        "callbacks": callbacks,
    }
    return pl.Trainer(**{**defaults, **options})
