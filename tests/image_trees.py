"""Image folders for tests, of random pixels."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from gradsync.datamodules import ImageNetDataModule


def write_tree(root: Path, num_train: int, num_val: int, classes: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """So many images of each class; smooth ones, since noise is no test for JPEG."""
    for split, count in (("train", num_train), ("val", num_val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng((label, number)).integers(0, 256, (4, 5, 3), dtype=np.uint8)
                size = (40 + number % 7, 30 + label)
                Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg")
    return root


def ready(datamodule: ImageNetDataModule, rank: int = 0, world_size: int = 1) -> ImageNetDataModule:
    """As Lightning would have it on one rank."""
    fake: Any = types.SimpleNamespace(
        world_size=world_size,
        num_devices=world_size,
        distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank},
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
    )
    datamodule.trainer = fake
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def batches_of(data: ImageNetDataModule, loader: DataLoader[Any]) -> list[tuple[Tensor, Tensor]]:
    """As the network would get them."""
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def epoch_of(data: ImageNetDataModule, loader: DataLoader[Any], epoch: int) -> tuple[Tensor, Tensor]:
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    images, labels = zip(*batches_of(data, loader), strict=True)
    return torch.cat(images), torch.cat(labels)
