"""``gradsync validate`` with a recipe and a file of weights judges them as torchvision's references do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from PIL import Image
from torch.nn import functional
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18

from gradsync.cli import _run_lightning
from gradsync.convert import main as convert

RECIPE = str(Path(__file__).parents[1] / "configs" / "recipe" / "baseline90.yaml")
CLASSES = 5


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many shapes, larger than 224 pixels and smaller."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(CLASSES * 4):
        pixels = torch.randint(0, 256, (6, 9, 3), generator=generator, dtype=torch.uint8).numpy()
        size = (150 + 60 * (number % 5), 180 + 50 * (number % 4))
        for split in ("train", "val"):
            path = root / split / f"n{number % CLASSES}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize(size).save(path)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: for 1,000 classes, and named after a checksum."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.save(resnet18().state_dict(), path)
    return path


def reference(root: Path, weights: Path, preprocess: Any) -> dict[str, float]:
    """The oracle: torchvision's own preprocessing, one image at a time."""
    net = resnet18()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    images = ImageFolder(str(root / "val"), preprocess)
    with torch.no_grad():
        logits = torch.stack([net(image[None])[0] for image, _ in images])
    labels = torch.tensor(images.targets)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    return {
        "val/loss": functional.cross_entropy(logits, labels).item(),
        "val/top1": 100 * (ranks < 1).float().mean().item(),
        "val/top5": 100 * (ranks < 5).float().mean().item(),
    }


def _validate(rank: int, root: Path, weights: Path, more: list[str]) -> dict[str, float]:
    arguments = ["validate", "--config", RECIPE, "--data.root", str(root), "--model.weights", str(weights)]
    model = ["--model.arch", "resnet18", "--model.num_classes", "1000", "--model.channels_last", "false"]
    run = [
        "--data.num_workers",
        "0",
        "--data.batch_size",
        "7",
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
    ]
    trainer = _run_lightning([*arguments, *model, *run, *more]).trainer
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", ["image folder", "Parquet"])
def test_figures_are_those_of_torchvisions_preprocessing(kind: str, tree: Path, weights: Path, tmp_path: Path) -> None:
    root = tree
    if kind == "Parquet":
        root = tmp_path / "shards"
        convert([str(tree), str(root)])
    [ours] = run_distributed(_validate, 1, root, weights, [])
    expected = reference(tree, weights, ResNet18_Weights.IMAGENET1K_V1.transforms())
    # The same pixels to 1e-6; batches of another size let convolutions round otherwise.
    assert ours == pytest.approx(expected, rel=1e-4)


def test_the_preprocessing_of_the_second_weights_is_a_flag(tree: Path, weights: Path) -> None:
    [ours] = run_distributed(_validate, 1, tree, weights, ["--data.eval_resize_size", "232"])
    expected = reference(tree, weights, ResNet50_Weights.IMAGENET1K_V2.transforms())
    assert ours == pytest.approx(expected, rel=1e-4)
    assert expected["val/loss"] != pytest.approx(
        reference(tree, weights, ResNet18_Weights.IMAGENET1K_V1.transforms())["val/loss"], rel=1e-4
    )
