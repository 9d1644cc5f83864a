"""Which part of an image the network sees, and in which size: (3, H, W) uint8 to (3, size, size) uint8.

Training scales with torch, on bytes in channels-last order, for which it has fast code; every few hundred of its values
differ from Pillow's by 1. Evaluation scales with Pillow, so that its pixels are those of the published accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop as Reference
from torchvision.transforms import v2

Crop = Callable[[Tensor, int], Tensor]
"""From an image and the wanted size; draws from torch's global generator if it is random."""

_SCALE, _RATIO = [0.08, 1.0], [3 / 4, 4 / 3]


def random_resized_crop(image: Tensor, size: int) -> Tensor:
    """ImageNet's usual augmentation: a random crop of random size and shape, scaled."""
    top, left, height, width = Reference.get_params(image, _SCALE, _RATIO)
    return scaled(image[:, top : top + height, left : left + width], size, size)


@final
class CentralCrop:
    """As published for ImageNet: the shorter side scaled to ``resize_size``, then the middle cut out."""

    def __init__(self, resize_size: int) -> None:
        self.resize_size = resize_size

    def __call__(self, image: Tensor, size: int) -> Tensor:
        pillow: Any = Image.fromarray(image.permute(1, 2, 0).numpy())
        cropped = v2.functional.center_crop(v2.functional.resize(pillow, [self.resize_size]), [size, size])
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def shifted(image: Tensor, size: int) -> Tensor:
    """For small images that the object fills: moved by up to 1/16 of the size."""
    return v2.RandomCrop(size, padding=max(1, size // 16))(scaled(image, size, size))


def whole(image: Tensor, size: int) -> Tensor:
    """For small images that the object fills."""
    return scaled(image, size, size)


def scaled(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased, bilinear."""
    if image.dtype != torch.uint8:
        raise ValueError(f"expected uint8, got {image.dtype}")
    # image[None] would have strides that torch does not take for channels-last.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
