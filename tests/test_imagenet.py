"""ImageNetDataModule: the tree, the batches, the share of each rank, and what it says about mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from distributed import run_distributed
from image_trees import batches_of, epoch_of, ready
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torch import Tensor

from gradsync.datamodules import ImageNetDataModule
from gradsync.errors import UserError
from gradsync.modules import ImageClassifier

CLASSES = ["apple", "bread", "cheese"]
NUM_TRAIN = 8  # per class
NUM_VAL = 3


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (20, 30) if path.suffix == ".png" else (20, 30, 3)  # the PNG files are grey
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate(CLASSES):
        for number in range(NUM_TRAIN):
            write_image(tmp_path / "train" / name / f"{number}.{'JPEG' if number % 2 else 'png'}", 100 * label + number)
        for number in range(NUM_VAL):
            write_image(tmp_path / "val" / name / f"{number}.png", 1000 * label + number)
    return tmp_path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSYNC_CACHE", str(tmp_path_factory.getbasetemp() / "gradsync-cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def test_attributes_of_an_image_folder(root: Path) -> None:
    data = ready(ImageNetDataModule(str(root), batch_size=4, image_size=16))
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    assert not data.is_demo
    assert data.description == f"{root} (image folder, 3 classes): 24 train, 9 val images of 16x16"


def test_attributes_of_the_bundled_images() -> None:
    data = ready(ImageNetDataModule())
    assert data.num_classes == 10
    assert "ankle_boot" in data.class_names
    assert data.is_demo
    assert data.description == (
        "bundled Fashion-MNIST subset (demo data, 10 classes): 1600 train, 400 val images of 32x32"
    )
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (64, 3, 32, 32)
    assert (labels[:40] == 0).all()


def test_batches(root: Path) -> None:
    data = ready(ImageNetDataModule(root, batch_size=5, image_size=16, num_workers=0))
    batches = batches_of(data, data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5]  # 24 images: the smaller rest is left out
    images, labels = batches[0]
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_images_are_224_pixels_unless_told_otherwise(root: Path) -> None:
    data = ready(ImageNetDataModule(root, batch_size=2, num_workers=0))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].shape == (2, 3, 224, 224)


def test_grey_files_become_rgb(root: Path) -> None:
    data = ready(ImageNetDataModule(root, 4, image_size=16, num_workers=0))
    images, _ = batches_of(data, data.val_dataloader())[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = images * std + mean
    assert torch.allclose(pixels[:, 0], pixels[:, 1], atol=1e-5)
    assert torch.allclose(pixels[:, 0], pixels[:, 2], atol=1e-5)


def test_order_and_augmentation_do_not_depend_on_workers_or_on_the_global_random_state(root: Path) -> None:
    def epochs(num_workers: int) -> list[tuple[Tensor, Tensor]]:
        data = ready(ImageNetDataModule(root, batch_size=4, image_size=16, num_workers=num_workers))
        loader = data.train_dataloader()  # its workers live through all epochs
        return [epoch_of(data, loader, epoch) for epoch in (0, 1, 0)]

    torch.manual_seed(1)
    first, second, first_again = epochs(num_workers=0)
    torch.manual_seed(2)
    with_workers = epochs(num_workers=2)
    assert torch.equal(first[0], first_again[0])
    assert not torch.equal(first[1], second[1])
    for (images, labels), (same_images, same_labels) in zip((first, second), with_workers, strict=False):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_augmentation_differs_between_epochs_and_seeds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def image(seed: int, epoch: int) -> Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        images: Any = ready(ImageNetDataModule(root, image_size=16, batch_size=4)).train_dataloader().dataset
        images.set_epoch(epoch)
        return images[5][0]

    assert torch.equal(image(0, 0), image(0, 0))
    assert not torch.equal(image(0, 0), image(0, 1))
    assert not torch.equal(image(0, 0), image(1, 0))


def test_reading_leaves_the_global_random_state_alone(root: Path) -> None:
    dataset = ready(ImageNetDataModule(root, image_size=16, batch_size=4)).train_dataloader().dataset
    state = torch.random.get_rng_state()
    dataset[3]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_images_of_an_epoch(root: Path, world_size: int) -> None:
    ranks = [ready(ImageNetDataModule(root, 4, 0, 16), rank, world_size) for rank in range(world_size)]
    trained = [index for data in ranks for index in data.train_dataloader().sampler]
    evaluated = [index for data in ranks for index in data.val_dataloader().sampler]
    assert sorted(trained) == list(range(24))
    assert sorted(evaluated) == list(range(9))  # 2 ranks: 5 and 4, none twice


def test_workers_persist(root: Path) -> None:
    loader = ready(ImageNetDataModule(root, 4, num_workers=1, image_size=16)).train_dataloader()
    assert loader.persistent_workers
    assert not loader.pin_memory
    assert ready(ImageNetDataModule(root, 4, image_size=16)).train_dataloader().num_workers >= 1
    assert ready(ImageNetDataModule()).train_dataloader().num_workers == 0


class _Recorder(pl.Callback):
    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.labels = [*getattr(self, "labels", []), *batch[1].tolist()]


def _test_on_rank(rank: int, root: Path, world_size: int) -> tuple[dict[str, float], list[int]]:
    pl.seed_everything(0, verbose=False)
    recorder = _Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        logger=False,
        callbacks=[recorder],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    model = ImageClassifier("squeezenet1_1", num_classes=3)
    data = ImageNetDataModule(root, batch_size=2, num_workers=0, image_size=32)
    trainer.test(model, data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, recorder.labels


def test_evaluation_sees_every_image_once_on_any_number_of_ranks(root: Path) -> None:
    (alone, labels), *_ = run_distributed(_test_on_rank, 1, root, 1)
    results = run_distributed(_test_on_rank, 2, root, 2)
    assert sorted(label for _, part in results for label in part) == labels
    for metrics, _ in results:
        assert metrics == pytest.approx(alone, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse has a new name for what Lightning calls
def test_flags(root: Path) -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(ImageNetDataModule, "data")
    config = parser.parse_args(["--data.root", str(root), "--data.batch_size", "7"])
    data = parser.instantiate_classes(config).data
    assert data.root == str(root)
    assert data.batch_size == 7
    assert parser.instantiate_classes(parser.parse_args(["--data.root", "null"])).data.is_demo
    assert str(root) in parser.dump(config)


def error_of(datamodule: ImageNetDataModule, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        ready(datamodule, world_size=world_size)
    return str(caught.value)


def test_error_without_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    text = error_of(ImageNetDataModule(root))
    assert text.startswith(f"no such folder: {root}, {root}/train, {root}/val. Looked for {root}/train and {root}/val,")
    assert "Expected below --data.root, an image folder" in text
    assert f"  {root}/\n    train/\n      <class>/" in text
    assert "Leave --data.root out" in text


def test_error_without_val(root: Path) -> None:
    (root / "val").rename(root / "validation")
    assert error_of(ImageNetDataModule(root)).startswith(f"no such folder: {root}/val. Looked for")


def test_error_with_images_outside_class_folders(root: Path) -> None:
    """As in the official archive of the validation images."""
    flat = root / "val"
    flat.rename(root / "sorted")
    write_image(flat / "ILSVRC2012_val_00000001.JPEG", 0)
    text = error_of(ImageNetDataModule(root))
    assert f"Couldn't find any class folder in {flat}" in text
    assert "Expected below --data.root" in text


def test_error_with_an_empty_class(root: Path) -> None:
    for file in (root / "train" / "bread").iterdir():
        file.unlink()
    text = error_of(ImageNetDataModule(root))
    assert "Found no valid file for the classes bread" in text
    assert "Expected below --data.root" in text


def test_error_with_different_classes(root: Path) -> None:
    (root / "val" / "apple").rename(root / "val" / "pear")
    text = error_of(ImageNetDataModule(root))
    assert text.startswith("train/ and val/ must hold the same classes. Only in train/: apple. Only in val/: pear.")


def test_error_with_a_batch_larger_than_the_share_of_a_rank(root: Path) -> None:
    assert error_of(ImageNetDataModule(root, batch_size=13), world_size=2) == (
        "--data.batch_size must be <= 12 (24 training images shared by 2 training processes), got 13"
    )
    ready(ImageNetDataModule(root, batch_size=12), world_size=2)


def test_error_with_fewer_validation_images_than_ranks(root: Path) -> None:
    text = error_of(ImageNetDataModule(root, batch_size=1), world_size=10)
    assert text.startswith("val/ must hold at least one image per training process (10), got 9")
    assert "--trainer.devices" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "--data.batch_size must be >= 1, got 0"),
        ({"num_workers": -1}, "--data.num_workers must be >= 0, got -1"),
        ({"image_size": 0}, "--data.image_size must be >= 1, got 0"),
    ],
)
def test_error_with_impossible_numbers(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageNetDataModule(**arguments)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == text


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_error_with_a_damaged_image_names_the_file(root: Path, content: bytes | str) -> None:
    victim = root / "val" / "apple" / "0.png"
    victim.write_bytes(content if isinstance(content, bytes) else victim.read_bytes()[:300])
    loader = ready(ImageNetDataModule(root, 4, 0, 16)).val_dataloader()
    with pytest.raises(UserError, match=rf"cannot read the image {victim} \(index 0\): "):
        next(iter(loader))


@pytest.fixture(autouse=True)
def _no_left_over_workers() -> Iterator[None]:
    yield
    import gc
    import multiprocessing

    gc.collect()
    assert not multiprocessing.active_children()
