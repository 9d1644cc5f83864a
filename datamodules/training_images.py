"""Training images whose order and augmentation depend on the seed, the epoch and the image, and on nothing else.

So every strategy sees the same data, whatever the number of loader workers, and so does a run that was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from typing_extensions import override

from ..errors import UserError

Transform = Callable[[Image.Image], Tensor]


def load_image(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: the file is no image, or is damaged.
    """
    try:
        return pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises a SyntaxError for a damaged PNG
        raise UserError(f"cannot read the image {path}: {error}") from error


@final
class TrainingImages(ImageFolder):
    """``ImageFolder`` that draws an image's augmentation from (seed, epoch, index), not from torch's global state."""

    def __init__(self, folder: Path, transform: Transform, seed: int) -> None:
        super().__init__(str(folder), transform, loader=load_image)
        self.seed = seed
        # In shared memory, because persistent loader workers keep the copy of the data set they started with.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @override
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with _random_state((self.seed, int(self._epoch), index)):
            return super().__getitem__(index)


@contextmanager
def _random_state(key: tuple[int, ...]) -> Iterator[None]:
    """Seed torch's CPU generator from the key, and restore it afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    # Hashed, because the generator takes 32 bits and neighbouring keys must not give neighbouring seeds.
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(state)
