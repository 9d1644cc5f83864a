"""Every configuration that comes with the project trains, and its recipe does what its numbers say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from distributed import run_distributed
from lightning.pytorch.callbacks import EMAWeightAveraging

from gradsync.cli import _run_lightning
from gradsync.datamodules import ImageNetDataModule
from gradsync.datamodules.bundled_images import bundled_image_tree
from gradsync.datamodules.resolution import ResolutionRamp
from gradsync.errors import UserError
from gradsync.modules import ImageClassifier

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
STRATEGIES = ("ddp", "manual_allreduce", "sharded_server", "parameter_server")


def _fit(rank: int, configs: list[str], arguments: list[str]) -> tuple[int, list[float], dict[str, Any]]:
    """Steps, learning rates of the parameter groups before any schedule, and the result file."""
    options = [part for config in configs for part in ("--config", str(CONFIGS / config))]
    trainer = _run_lightning(["fit", *options, *arguments]).trainer
    rates = [group["initial_lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    results = list(Path(arguments[arguments.index("--run_dir") + 1]).glob("results_*.json"))
    return trainer.global_step, rates, json.loads(results[0].read_text()) if results else {}


def fit(configs: list[str], folder: Path, world_size: int = 1, more: tuple[str, ...] = ()) -> Any:
    arguments = {
        "--data.root": bundled_image_tree(),
        "--data.batch_size": 4,
        "--data.num_workers": 0,
        "--model.arch": "resnet18",
        "--trainer.accelerator": "cpu",
        "--trainer.devices": world_size,
        "--trainer.max_steps": 2,
        "--trainer.limit_val_batches": 1,
        "--trainer.num_sanity_val_steps": 0,
        "--run_dir": folder / "run",
    }
    flags = [str(part) for pair in arguments.items() for part in pair]
    return run_distributed(_fit, world_size, configs, [*flags, *more])


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_trains(name: str, tmp_path: Path) -> None:
    world_size = 1 if "strategy/" not in name else 3 if "parameter_server" in name else 2
    num_steps, _, result = fit([name], tmp_path, world_size)[-1]
    assert num_steps == 2
    assert len(result["all_losses"]) == 2
    assert all(math.isfinite(loss) for loss in result["all_losses"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["baseline90", "fast16"])
def test_recipes_train_under_every_strategy(name: str, strategy: str, tmp_path: Path) -> None:
    recipe = f"recipe/{name}.yaml"
    ranks = fit([recipe, f"strategy/{strategy}.yaml"], tmp_path, 3)
    workers = 2 if strategy == "parameter_server" else 3
    init = yaml.safe_load((CONFIGS / recipe).read_text())["model"]["init_args"]
    scaled = init["optimizer"]["init_args"]["lr"] * 4 * workers / init["reference_batch_size"]
    for num_steps, rates, _ in ranks[-workers:]:
        assert num_steps == 2
        assert rates == pytest.approx([scaled] * len(rates), rel=1e-12)


def test_the_number_of_epochs_and_published_figures_are_said() -> None:
    for name, epochs in (("baseline90", 90), ("fast16", 16)):
        text = (CONFIGS / "recipe" / f"{name}.yaml").read_text()
        assert yaml.safe_load(text)["trainer"]["max_epochs"] == epochs
        assert "Not reproduced here" in text


def module(**options: Any) -> ImageClassifier:
    built = ImageClassifier("resnet18", num_classes=3, schedule="constant", **options)
    built.configure_model()
    return built


def _optimizer(model: ImageClassifier, **options: Any) -> torch.optim.Optimizer:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, **options)
    trainer.datamodule = ImageNetDataModule(batch_size=6)  # pyright: ignore[reportAttributeAccessIssue]
    model.trainer = trainer
    configured: Any = model.configure_optimizers()
    return configured["optimizer"]


def test_no_decay_on_norms_and_biases() -> None:
    model = module(decay_norms_and_biases=False)
    decayed, others = _optimizer(model).param_groups
    assert others["weight_decay"] == 0
    assert decayed["weight_decay"] == 1e-4
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(
        "bn" in names[id(p)] or "bias" in names[id(p)] or "downsample.1" in names[id(p)] for p in others["params"]
    )
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])


def test_learning_rate_grows_with_the_global_batch() -> None:
    assert _optimizer(module(reference_batch_size=3)).param_groups[0]["lr"] == pytest.approx(0.05 * 2)
    optimizer = _optimizer(module(reference_batch_size=3), accumulate_grad_batches=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 8)
    assert _optimizer(module()).param_groups[0]["lr"] == 0.05
    with pytest.raises(UserError, match=r"--model.reference_batch_size must be >= 1, got 0"):
        module(reference_batch_size=0)


def test_resolution_ramp() -> None:
    ramp = ResolutionRamp(start_size=160, start_epoch=10, end_epoch=13)
    assert [ramp.size_at(epoch, 192) for epoch in (0, 10, 11, 12, 13, 15)] == [160, 160, 160, 192, 192, 192]
    assert [ResolutionRamp(128, 0, 4).size_at(epoch, 224) for epoch in range(5)] == [128, 160, 192, 192, 224]
    for wrong in ((0, 1, 2), (128, 2, 2), (128, -1, 2)):
        with pytest.raises(UserError, match=r"--data.resolution_ramp"):
            ResolutionRamp(*wrong)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_grow_with_the_epochs(num_workers: int) -> None:
    from image_trees import ready

    ramp = ResolutionRamp(start_size=32, start_epoch=0, end_epoch=2)
    data = ready(
        ImageNetDataModule(bundled_image_tree(), 8, num_workers, image_size=64, eval_size=96, resolution_ramp=ramp)
    )
    loader: Any = data.train_dataloader()  # its workers live through all epochs
    for epoch, size in ((0, 32), (1, 64), (2, 64)):  # 48 is no multiple of 32
        loader.sampler.set_epoch(epoch)
        assert next(iter(loader))[0].shape[-1] == size
    assert next(iter(data.val_dataloader()))[0].shape[-1] == 96


def test_the_average_of_weights_is_in_the_recipe() -> None:
    [callback] = yaml.safe_load((CONFIGS / "recipe" / "fast16.yaml").read_text())["trainer"]["callbacks"]
    assert callback["class_path"] == f"lightning.pytorch.callbacks.{EMAWeightAveraging.__name__}"
