"""A run that its loader holds back, and one that computes: both by real training, told apart by the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from distributed import run_distributed
from image_trees import write_tree
from PIL import Image

from gradsync.callbacks import CommunicationMonitor, ResultsWriter
from gradsync.datamodules import ImageNetDataModule
from gradsync.modules import ImageClassifier
from gradsync.report import load_comparison
from gradsync.report.caveats import warning_lines
from gradsync.report.document import document_of


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take 20 ms each to decode."""
    root = tmp_path_factory.mktemp("large")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((2000, 1500))
    for split, count in (("train", 40), ("val", 2)):
        (root / split / "a").mkdir(parents=True)
        image.save(root / split / "a" / "0.jpg")
        for number in range(1, count):
            (root / split / "a" / f"{number}.jpg").hardlink_to(root / split / "a" / "0.jpg")
    return root


def _fit(rank: int, root: Path, arch: str, size: int, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        callbacks=[CommunicationMonitor(warmup_steps=1), ResultsWriter(folder, variant=f"arch={arch}")],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    data = ImageNetDataModule(root, batch_size=8, num_workers=0, image_size=size)
    trainer.fit(ImageClassifier(arch, num_classes=3), data)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_loader_bound_and_compute_bound_are_told_apart(large: Path, tmp_path: Path) -> None:
    small = write_tree(tmp_path / "small", 16, 1)
    runs: dict[str, tuple[Path, int]] = {"squeezenet1_1": (large, 32), "resnet18": (small, 96)}
    for arch, (root, size) in runs.items():
        run_distributed(_fit, 1, root, arch, size, tmp_path)
    comparison = load_comparison(tmp_path)
    told = [line for line in warning_lines(comparison) if "loader-bound" in line]
    assert len(told) == 1, told
    assert "squeezenet1_1 is loader-bound" in told[0]
    assert "--data.num_workers" in told[0]
    shares: dict[str, Any] = {
        group.method: group.comm("data_ms").median / group.comm("step_ms").median for group in comparison.groups
    }
    loader_bound, compute_bound = (next(v for k, v in shares.items() if arch in k) for arch in runs)
    assert loader_bound > 0.5
    assert compute_bound < 0.1
    assert any("loader-bound" in line for line in str(document_of(comparison)).splitlines())
