"""Decoding, cropping and scaling give the pixels of torchvision's reference: PIL, antialiased."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from gradsync.datamodules import decoding
from gradsync.datamodules.cropping import CentralCrop, random_resized_crop, scaled
from gradsync.datamodules.decoding import UndecodableImage, decode, decode_by_pil


def photograph(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth, with edges: what JPEG is made for."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((width, height))
    image.paste((255, 30, 0), (width // 4, height // 4, width // 2, height // 2))
    return image


def file(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(photograph(), exif=exif.tobytes())


FILES = {
    "jpeg": lambda: file(photograph()),
    "progressive": lambda: file(photograph(), progressive=True),
    "full colour": lambda: file(photograph(), subsampling=0),
    "grey": lambda: file(photograph().convert("L")),
    "cmyk": lambda: file(photograph().convert("CMYK")),
    "exif-rotated": rotated,
    "png": lambda: file(photograph(), "PNG"),
    "png, transparent": lambda: file(photograph().convert("RGBA"), "PNG"),
    "png, palette": lambda: file(photograph().convert("P"), "PNG"),
    "png, 16 bit grey": lambda: file(Image.fromarray(np.full((9, 7), 40000, dtype=np.uint16)), "PNG"),
    "webp": lambda: file(photograph(), "WEBP"),
    "one pixel": lambda: file(photograph(1, 1)),
    "huge": lambda: file(photograph(6000, 5000)),
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_pil(kind: str) -> None:
    content = FILES[kind]()
    image, reference = decode(content), decode_by_pil(content)
    assert image.dtype == torch.uint8
    assert image.shape == reference.shape
    # Within 1 level on average, since versions of libjpeg may differ in it; here all are the same.
    assert mean_difference(image, reference) <= 1


def mean_difference(a: Tensor, b: Tensor) -> float:
    return (a.int() - b.int()).abs().float().mean().item()


def test_a_jpeg_does_not_go_through_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_by_pil", None)
    for kind in ("jpeg", "progressive", "grey"):
        decode(FILES[kind]())


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "cmyk"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.95])
def test_a_truncated_file_is_an_error(kind: str, share: float) -> None:
    content = FILES[kind]()
    with pytest.raises(UndecodableImage):
        decode(content[: int(len(content) * share)])


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 80), (1, 1), (3, 900)])
def test_evaluation_crop_is_the_published_one(size: tuple[int, int]) -> None:
    image = photograph(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    reference = functional.center_crop(functional.resize(image, [256], antialias=True), [224, 224])
    crop = CentralCrop(256)(pixels, 224)
    assert torch.equal(crop, functional.pil_to_tensor(reference))


@pytest.mark.parametrize("size", [(500, 375), (100, 80), (20, 900), (2, 1)])
def test_training_crop_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    image = photograph(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        crop = random_resized_crop(pixels, 64)
        torch.manual_seed(seed)
        reference = RandomResizedCrop(64, antialias=True)(image)
        assert mean_difference(crop, functional.pil_to_tensor(reference)) <= 1


def test_scaling_refuses_floats() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        scaled(torch.zeros(3, 4, 4), 2, 2)


def test_pixels_of_published_weights() -> None:
    """What torchvision's presets make of a file, to 1e-6, for the order of rounding in the normalization."""
    from torchvision.models import ResNet50_Weights

    from gradsync.datamodules.batches import normalized

    content = file(photograph(500, 375))
    for weights, resize_size in ((ResNet50_Weights.IMAGENET1K_V1, 256), (ResNet50_Weights.IMAGENET1K_V2, 232)):
        ours = normalized(CentralCrop(resize_size)(decode(content), 224)[None])[0]
        reference = weights.transforms()(Image.open(io.BytesIO(content)).convert("RGB"))
        assert (ours - reference).abs().max() < 1e-6
