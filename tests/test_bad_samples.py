"""Images that cannot be read: the run stops and names one, or goes on without them, in step, and counts them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from image_trees import ready, write_tree

from gradsync.callbacks import CommunicationMonitor, ResultsWriter
from gradsync.convert import main as convert
from gradsync.datamodules import ImageNetDataModule
from gradsync.errors import UserError
from gradsync.modules import ImageClassifier
from gradsync.report import load_results

BAD = ("train/a/0003.jpg", "train/b/0000.jpg", "val/c/0001.jpg")
GONE = "train/c/0007.jpg"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = write_tree(tmp_path / "tree", 8, 2)
    for name in BAD:
        (root / name).write_bytes((root / name).read_bytes()[:400])
    return root


class _Counter(pl.Callback):
    """Batches of every epoch, and their sizes."""

    def __init__(self) -> None:
        self.train: list[int] = []
        self.val: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.train.append(len(batch[1]))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.val.append(len(batch[1]))


def _fit(rank: int, root: str, folder: Path, world_size: int) -> tuple[list[int], list[int], dict[str, float]]:
    pl.seed_everything(0, verbose=False)
    counter = _Counter()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=2,
        logger=False,
        callbacks=[counter, CommunicationMonitor(), ResultsWriter(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    data = ImageNetDataModule(root, batch_size=2, num_workers=2, image_size=32, bad_samples="skip")
    trainer.fit(ImageClassifier("squeezenet1_1", num_classes=3), data)
    return counter.train, counter.val, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_skipping_keeps_ranks_in_step_and_counts(tree: Path, tmp_path: Path, world_size: int) -> None:
    (tree / GONE).unlink()
    root = tree
    ranks = run_distributed(_fit, world_size, str(root), tmp_path, world_size)
    steps = 23 // world_size // 2
    assert [train for train, _, _ in ranks] == [[2] * 2 * steps] * world_size
    assert sum(sum(val) for _, val, _ in ranks) == 2 * 5  # in each epoch all but one
    [result] = load_results(tmp_path).results
    content = json.loads((tmp_path / result.filename).read_text())
    if world_size == 1:
        assert content["bad_samples"] == {"count": 3, "first": [f"{tree}/{name}" for name in BAD]}
    assert result.num_bad_samples == content["bad_samples"]["count"] <= 3
    assert f"{tree}/{BAD[-1]}" in content["bad_samples"]["first"]


def test_a_bad_samples_place_is_taken_by_the_next(tree: Path) -> None:
    images: Any = ready(ImageNetDataModule(tree, 2, 0, 32, bad_samples="skip")).train_dataloader().dataset
    for bad, following in ((3, 4), (8, 9)):
        assert images[bad][1] == images[following][1]
        image, label = images._next_good(bad)
        expected, expected_label = images._next_good(following)
        assert torch.equal(image, expected)
        assert label == expected_label


def test_a_file_that_has_gone_is_bad(tree: Path) -> None:
    data = ready(ImageNetDataModule(tree, 2, 0, 32, bad_samples="skip"))
    (tree / GONE).unlink()
    assert data.train_dataloader().dataset[23]
    flags = data.bad_sample_flags()
    assert flags is not None
    assert [data.sample_name(index) for index in flags.nonzero().flatten().tolist()] == [f"{tree}/{GONE}"]


def test_stopping_names_path_and_index(tree: Path) -> None:
    data = ready(ImageNetDataModule(tree, 2, 2, 32))
    with pytest.raises(UserError) as caught:
        list(data.train_dataloader())
    text = str(caught.value)  # around which the loader process has put a traceback
    del caught  # whose frames hold the loader, and that its processes
    gc.collect()
    assert any(f"cannot read the image {tree}/{name} (index {index})" in text for name, index in (
        (BAD[0], 3), (BAD[1], 8)
    ))  # fmt: skip
    assert "--data.bad_samples skip" in text


def test_parquet_names_shard_and_row(tree: Path, tmp_path: Path) -> None:
    convert([str(tree), str(tmp_path / "shards"), "--images-per-shard", "5"])
    data = ready(ImageNetDataModule(tmp_path / "shards", 2, 0, 32))
    with pytest.raises(UserError, match=r"train-00001-of-00005.parquet, row 3 \(index 8\)"):
        data.train_dataloader().dataset[8]


def test_error_without_a_single_good_image(tmp_path: Path) -> None:
    root = write_tree(tmp_path, 2, 1)
    for file in root.glob("train/*/*"):
        file.write_bytes(b"")
    data = ready(ImageNetDataModule(root, 2, 0, 32, bad_samples="skip"))
    with pytest.raises(UserError, match="no training image that can be read"):
        list(data.train_dataloader())


def test_a_batch_of_bad_samples_only_is_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path, 4, 4)
    for file in root.glob("val/b/*"):
        file.write_bytes(b"")
    data = ready(ImageNetDataModule(root, 2, 0, 32, bad_samples="skip"))
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [[0, 0], [0, 0], [2, 2], [2, 2]]
