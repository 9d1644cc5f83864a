"""Small real trainings that run on every rank of :func:`distributed.run_distributed`."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from distributed import run_distributed
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradsync
from gradsync.callbacks.ddp_timeline import DDPTimeline
from gradsync.modules import ImageClassifier

NUM_CLASSES = 3


class Mlp(pl.LightningModule):
    """A plain MLP; options add what distributed training tends to get wrong."""

    def __init__(
        self,
        batch_norm: bool = False,
        frozen: bool = False,
        unused: bool = False,
        optimizer: str = "sgd",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(32) if batch_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(10, 32), norm, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)
        )
        self.extra = nn.Linear(4, 4) if unused else nn.Identity()
        self.kind = optimizer
        if frozen:
            self.net[0].requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.kind == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class TwoOptimizers(Mlp):
    """Manual optimization, one optimizer per half of the network, two backward passes per batch."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = self.net[:3].parameters(), self.net[3:].parameters()
        return torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, lr=1e-2)

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()


class TwoSchedules(TwoOptimizers):
    """With a schedule each, clipping by value by hand, and a window of three batches whose last one is incomplete."""

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return list(optimizers), [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]

    def training_step(self, batch: Any, index: int) -> None:
        is_last = index % 3 == 2 or self.trainer.is_last_batch
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not is_last:
            with self.trainer.strategy.block_backward_sync():
                return self.manual_backward(loss)
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.clip_gradients(optimizer, 0.01, "value")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return None


MODULES = {"two_optimizers": TwoOptimizers, "two_schedules": TwoSchedules}


class Traffic(pl.Callback):
    """Bytes that each step sent and received."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        ddp = isinstance(trainer.strategy, DDPStrategy)
        self._timeline = DDPTimeline(trainer.strategy.model) if ddp else getattr(trainer.strategy, "timeline", None)

    def on_train_batch_end(self, *args: Any) -> None:
        # SWA's last epoch has no steps
        if self._timeline is not None and (step := self._timeline.take_step()) is not None:
            self.bytes.append(step.num_bytes)


def make_data(num: int = 480) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, NUM_CLASSES, (num,), generator=generator)
    return TensorDataset(torch.randn(num, 10, generator=generator) + labels[:, None], labels)


def make_trainer(strategy: Any, devices: int, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 20,
    }
    return pl.Trainer(strategy=strategy, devices=devices, **{**defaults, **options})


def make_strategy(name: str, options: dict[str, Any] | None = None) -> Any:
    if name == "ddp":
        return DDPStrategy(**(options or {}))
    return gradsync.STRATEGIES[name](**(options or {}))


def quiet() -> None:
    """Ranks are separate processes: hints of Lightning about speed are not what a trial is about."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def train(
    rank: int,
    strategy: str,
    devices: int,
    model: dict[str, Any] | str | None = None,
    trainer: dict[str, Any] | None = None,
    strategy_options: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    batch_size: int = 8,
    validate: bool = False,
) -> dict[str, torch.Tensor]:
    """Fit and return the state dict this process ends with, and its validation metrics."""
    quiet()
    pl.seed_everything(1, verbose=False)
    module = MODULES[model]() if isinstance(model, str) else Mlp(**(model or {}))
    runner = make_trainer(make_strategy(strategy, strategy_options), devices, **(trainer or {}))
    loader = DataLoader(make_data(), batch_size=batch_size)
    runner.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {**state, **{f"metric {name}": value for name, value in runner.callback_metrics.items() if name != "loss"}}


def train_classifier(
    rank: int, strategy: str, devices: int, model: dict[str, Any], trainer: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Three steps of a ResNet-18 on four images of 32 pixels: the state dict, and the bytes of every step."""
    quiet()
    pl.seed_everything(1, verbose=False)
    module = ImageClassifier("resnet18", num_classes=NUM_CLASSES, **model)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(images, torch.arange(24) % NUM_CLASSES), batch_size=4)
    traffic = Traffic()
    runner = make_trainer(
        make_strategy(strategy),
        devices,
        **{"max_steps": 3, "callbacks": [traffic], "num_sanity_val_steps": 0} | (trainer or {}),
    )
    runner.fit(module, loader, loader)
    return {name: value.clone() for name, value in module.state_dict().items()}, traffic.bytes


@lru_cache(maxsize=4)  # 90 MB each, in every process that is forked
def fitted_classifiers(strategy: str, **model: Any) -> list[tuple[dict[str, torch.Tensor], list[int]]]:
    """What :func:`train_classifier` returns in each of two training processes; trained once for tests in a row."""
    processes = num_processes(strategy, 2)
    return trainers_only(strategy, run_distributed(train_classifier, processes, strategy, processes, model))


def num_processes(strategy: str, num_trainers: int) -> int:
    """All processes of a run with ``num_trainers`` training ones."""
    return num_trainers + (1 if strategy == "parameter_server" else 0)


def trainers_only(strategy: str, results: list[Any]) -> list[Any]:
    """Results of the training processes, in rank order."""
    return results[1:] if strategy == "parameter_server" else results


def newest_checkpoint(folder: str | Path) -> str:
    return str(max(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))
