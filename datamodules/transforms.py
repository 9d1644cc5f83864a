"""From an RGB image to the network's input: (3, size, size), float32, normalized with ImageNet's mean and deviation."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def train_transform(size: int) -> v2.Compose:
    """ImageNet's usual augmentation: a random crop of random size and shape, scaled; half of them mirrored."""
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *_to_input()])


def eval_transform(size: int) -> v2.Compose:
    """As published for ImageNet: the shorter side scaled to 256/224 of the size, then the middle cut out."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), *_to_input()])


def demo_train_transform(size: int) -> v2.Compose:
    """For small images that the object fills: shifted by up to 1/16 of the size, half of them mirrored."""
    shifted = v2.RandomCrop(size, padding=max(1, size // 16))
    return v2.Compose([v2.Resize((size, size), antialias=True), shifted, v2.RandomHorizontalFlip(), *_to_input()])


def demo_eval_transform(size: int) -> v2.Compose:
    """For small images that the object fills: the whole image."""
    return v2.Compose([v2.Resize((size, size), antialias=True), *_to_input()])


def _to_input() -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
