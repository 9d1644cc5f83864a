"""What is done to a whole batch: put together by the loader as bytes, finished on the device as the network's input.

Bytes are a quarter of what floats would be on the way from the loader's workers and to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from torchvision.transforms import v2

from .huge_pages import empty_in_huge_pages
from .images import random_state

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Seeds = np.ndarray[Any, np.dtype[np.int64]]


def collate_training(samples: Sequence[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Seeds]:
    """Images (N, 3, H, W) uint8 in channels-last memory, labels (N,) int64, seeds (N,): these stay on the host."""
    images, labels, seeds = zip(*samples, strict=True)
    return _stacked(images), torch.tensor(labels), np.array(seeds)


def collate_evaluation(samples: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    """The same without seeds and without bad samples; None if there is no other."""
    good = [sample for sample in samples if sample is not None]
    if not good:
        return None
    images, labels = zip(*good, strict=True)
    return _stacked(images), torch.tensor(labels)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    # As (height, width, channel) an image is one block of memory.
    blocks = [image.permute(1, 2, 0) for image in images]
    if get_worker_info() is not None:  # it puts them where the processes share them
        return default_collate(blocks).permute(0, 3, 1, 2)
    out = empty_in_huge_pages((len(blocks), *blocks[0].shape), torch.uint8)
    return torch.stack(blocks, out=out).permute(0, 3, 1, 2)


@final
class TrainingBatch:
    """Mirrors half of the images, erases, normalizes and mixes; each sample's randomness comes from its own seed.

    Args:
        mixup: Parameter of the Beta distribution of MixUp (https://arxiv.org/abs/1710.09412); 0 for none.
        cutmix: The same of CutMix (https://arxiv.org/abs/1905.04899). With both, one of them by chance for each batch.
        erasing: Probability of Random Erasing (https://arxiv.org/abs/1708.04896).
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, erasing: float = 0.0) -> None:
        self._mixing = [kind for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
        self._alphas = [alpha for alpha in (mixup, cutmix) if alpha > 0]
        self._erase = v2.RandomErasing(erasing) if erasing > 0 else None

    def __call__(self, images: Tensor, labels: Tensor, seeds: Seeds, num_classes: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float32; labels (N,) int64, or (N, num_classes) float32 where images are mixed.

        ``images`` is changed.
        """
        finished = normalized(mirrored(images, seeds & 1 == 1))
        if self._erase is not None:
            for number, seed in enumerate(seeds.tolist()):
                with random_state(seed):
                    finished[number] = self._erase(finished[number])
        return self._mixed(finished, labels, int(seeds[0]), num_classes) if self._mixing else (finished, labels)

    def _mixed(self, images: Tensor, labels: Tensor, seed: int, num_classes: int) -> tuple[Tensor, Tensor]:
        with random_state(seed):
            chosen = int(torch.randint(len(self._mixing), ()))
            return self._mixing[chosen](alpha=self._alphas[chosen], num_classes=num_classes)(images, labels)


def mirrored(images: Tensor, which: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
    """Turn the chosen images left to right; on a CPU in place."""
    if images.device.type != "cpu":
        chosen = torch.from_numpy(which).to(images.device, non_blocking=True)
        return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)
    for number in np.flatnonzero(which).tolist():
        images[number] = images[number].flip(-1)
    return images


def normalized(images: Tensor) -> Tensor:
    """From bytes to float32 with ImageNet's mean 0 and deviation 1, in channels-last memory."""
    num, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(num * height, width * channels)
    scale, shift = (_row(values, width, images.device) for values in _scale_and_shift())
    if images.device.type == "cpu":  # image by image, because that much stays in its cache between the two passes
        out, step = empty_in_huge_pages(rows.shape, torch.float32), height
    else:
        out, step = torch.empty(rows.shape, dtype=torch.float32, device=images.device), len(rows)
    for first in range(0, len(rows), step):
        part = out[first : first + step]
        torch.addcmul(shift, part.copy_(rows[first : first + step]), scale, out=part)
    return out.view(num, height, width, channels).permute(0, 3, 1, 2)


def normalized_naively(images: Tensor) -> Tensor:
    """The oracle."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def _scale_and_shift() -> tuple[Sequence[float], Sequence[float]]:
    return [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]


def _row(values: Sequence[float], width: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat(width).to(device, non_blocking=True)
