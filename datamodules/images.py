"""The images of a split as the loader reads them: decoded, cropped, scaled; still bytes.

What a training image looks like depends on the seed, the epoch and the image, and on nothing else. So every strategy
sees the same data, whatever the number of loader workers, and so does a run that was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .cropping import Crop
from .decoding import UndecodableImage, decode
from .image_source import ImageSource

OnBadSample = Literal["stop", "skip"]


@final
class ImageReader:
    """Pixels by index. Those that cannot be read are noted, where that is wanted, in memory that all loaders share."""

    def __init__(self, source: ImageSource, bad_samples: OnBadSample) -> None:
        self.source = source
        self._stops = bad_samples == "stop"
        self.is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()
        """(len,) uint8: 1 for those met so far, by this process and its loader workers."""

    def read(self, index: int) -> tuple[Tensor, int] | None:
        """(3, H, W) uint8 and the label, or None for a bad sample that is to be skipped.

        Raises:
            UserError: a bad sample, and ``bad_samples`` is ``stop``.
        """
        try:
            content, label = self.source.read(index)
            return decode(content), label
        except (OSError, UndecodableImage) as error:
            self._note(index, error)
            return None

    def _note(self, index: int, error: Exception) -> None:
        if self._stops:
            raise UserError(
                f"cannot read the image {self.source.name(index)} (index {index}): {error}\n"
                "Mend or remove it, or train without such images and have them counted: --data.bad_samples skip"
            ) from error
        self.is_bad[index] = 1


@final
class TrainingImages(Dataset[tuple[Tensor, int, int]]):
    """Image, label, and the seed of whatever is done to the image later on.

    A bad sample's place is taken by the next good one, so that all ranks take the same number of steps.
    """

    def __init__(self, reader: ImageReader, crop: Crop, size: Callable[[int], int], seed: int) -> None:
        self.reader = reader
        self.seed = seed
        self._crop = crop
        self._size = size
        # In shared memory, because persistent loader workers keep the copy of the data set they started with.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.reader.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self._next_good(index)
        epoch = int(self._epoch)
        crop_seed, later_seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(2).tolist()
        with random_state(crop_seed):
            return self._crop(image, self._size(epoch)), label, later_seed

    def _next_good(self, index: int) -> tuple[Tensor, int]:
        for offset in range(len(self)):
            if (sample := self.reader.read((index + offset) % len(self))) is not None:
                return sample
        raise UserError("--data.root holds no training image that can be read")


@final
class EvaluationImages(Dataset[tuple[Tensor, int] | None]):
    """Image and label; None for a bad sample."""

    def __init__(self, reader: ImageReader, crop: Crop, size: int) -> None:
        self.reader = reader
        self._crop = crop
        self._size = size

    def __len__(self) -> int:
        return len(self.reader.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        sample = self.reader.read(index)
        return None if sample is None else (self._crop(sample[0], self._size), sample[1])


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator with 32 bits, and restore it afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
