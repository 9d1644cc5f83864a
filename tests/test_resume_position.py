"""A resumed run trains on the samples that the uninterrupted one would have, in their order, augmented alike."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import make_trainer, quiet

from gradsync.callbacks import StopOnSignal
from gradsync.convert import main as convert
from gradsync.datamodules import ImageNetDataModule
from gradsync.datamodules.bundled_images import bundled_image_tree
from gradsync.errors import StoppedBySignal

STEPS_PER_EPOCH = 5
GLOBAL_BATCH = 1600 // STEPS_PER_EPOCH

Seen = list[tuple[int, list[float]]]
"""Per step: the epoch, and a number for every image that tells it and its augmentation from the others."""


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Record(pl.Callback):
    def __init__(self, kill_after: int | None = None) -> None:
        self.seen: Seen = []
        self.kill_after = kill_after

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        numbers = batch[0].flatten(1).double() @ torch.linspace(1, 2, 3 * 32 * 32, dtype=torch.float64)
        self.seen.append((trainer.current_epoch, numbers.tolist()))
        if len(self.seen) == self.kill_after:
            os.kill(os.getpid(), signal.SIGTERM)


def _fit(folder: Path, resume: str | None = None, world_size: int = 1, **options: Any) -> tuple[Seen, Linear]:
    quiet()
    num_workers, kill_after = options.pop("num_workers", 0), options.pop("kill_after", None)
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, **options.pop("checkpoints", {}))
    record, model, data_options = Record(kill_after), Linear(), options.pop("data", {})
    options = {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 1, "enable_checkpointing": True, **options}
    callbacks = [record, checkpoints, *([StopOnSignal()] if kill_after else [])]
    trainer = make_trainer("ddp" if world_size > 1 else "auto", world_size, callbacks=callbacks, **options)
    data = ImageNetDataModule(
        batch_size=GLOBAL_BATCH // world_size, num_workers=num_workers, image_size=32, **data_options
    )
    if kill_after:
        with pytest.raises(StoppedBySignal):
            trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return record.seen, model


CASES = {
    "in mid-epoch": ({"checkpoints": {"every_n_train_steps": 2}}),
    "after the last batch of an epoch": ({"checkpoints": {"every_n_train_steps": STEPS_PER_EPOCH}}),
    "at the end of the training epoch": ({"checkpoints": {"save_on_train_epoch_end": True}}),
    "after validation in mid-epoch": ({"val_check_interval": 2, "checkpoints": {"save_on_train_epoch_end": False}}),
    "with accumulation": ({"accumulate_grad_batches": 2, "checkpoints": {"every_n_train_steps": 2}}),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images in 7 shards of 3 row groups."""
    folder = tmp_path_factory.mktemp("shards")
    convert([str(bundled_image_tree()), str(folder), "--images-per-shard", "250"])
    return folder


@pytest.mark.parametrize("kind", ["image folder", "Parquet"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_sees_what_the_uninterrupted_one_does(
    case: str, num_workers: int, kind: str, shards: Path, tmp_path: Path
) -> None:
    # A window that is less than the whole; and every augmentation, since mixing draws for a whole batch.
    parquet = {"root": shards, "shuffle_window": 400, "mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.2}
    options = {**CASES[case], "num_workers": num_workers, "data": parquet if kind == "Parquet" else {}}
    whole, trained = _fit(tmp_path / "whole", **dict(options))
    assert len(whole) == 3 * STEPS_PER_EPOCH
    files = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for file in (files[0], files[len(files) // 2]):
        saved = torch.load(file, weights_only=True)["loops"]["fit_loop"]
        done = saved["epoch_loop.batch_progress"]["total"]["processed"]
        rest, resumed = _fit(tmp_path / "again", str(file), **dict(options))
        assert rest == whole[done:], (file.name, [epoch for epoch, _ in rest])
        for a, b in zip(trained.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), file.name


@pytest.mark.parametrize("kind", ["image folder", "Parquet"])
def test_a_run_stopped_by_a_signal_goes_on_where_it_was(kind: str, shards: Path, tmp_path: Path) -> None:
    data = {"root": shards, "shuffle_window": 400} if kind == "Parquet" else {}
    whole, _ = _fit(tmp_path / "whole", data=data)
    begun, _ = _fit(tmp_path / "stopped", kill_after=7, num_workers=2, data=data)
    rest, _ = _fit(tmp_path / "again", str(tmp_path / "stopped" / "last.ckpt"), data=data)
    assert len(begun) >= 7
    assert begun + rest == whole


def _fit_rank(rank: int, folder: Path, resume: str | None, world_size: int) -> Seen:
    return _fit(folder, resume, world_size, checkpoints={"every_n_train_steps": 2})[0]


def _together(ranks: list[Seen]) -> list[tuple[int, list[float]]]:
    """Per step the images of all ranks, in no order."""
    return [(steps[0][0], sorted(number for _, part in steps for number in part)) for steps in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_makes_the_same_steps_of_the_same_samples(
    before: int, after: int, tmp_path: Path
) -> None:
    whole = _together([_fit(tmp_path / "whole", checkpoints={"every_n_train_steps": 2})[0]])
    run_distributed(_fit_rank, before, tmp_path / "before", None, before)
    file = next((tmp_path / "before").glob("*step=8.ckpt"))
    rest = _together(run_distributed(_fit_rank, after, tmp_path / "after", str(file), after))
    assert rest == whole[8:]
