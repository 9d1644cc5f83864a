"""ImageClassifier: networks by name, weights, figures per epoch, checkpoints, schedules, flags."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from gradsync.errors import UserError
from gradsync.modules import ImageClassifier
from gradsync.modules.metrics import MeanLoss, PercentCorrect
from gradsync.modules.networks import build_network
from gradsync.modules.schedules import Schedule, learning_rate_factor
from gradsync.modules.weights import load_weights

NUM_CLASSES = 6
ARCH = "squeezenet1_1"  # the smallest


class RandomImages(pl.LightningDataModule):
    num_classes = NUM_CLASSES

    def train_dataloader(self) -> DataLoader:
        return self._loader(8)

    def val_dataloader(self) -> DataLoader:
        return self._loader(10)  # the last batch is smaller

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _loader(self, num_images: int) -> DataLoader:
        generator = torch.Generator().manual_seed(num_images)
        images = torch.randn(num_images, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(num_images) % NUM_CLASSES), batch_size=4)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(**options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**(defaults | options))

    return make


def built(*args: Any, **kwargs: Any) -> ImageClassifier:
    torch.manual_seed(0)
    module = ImageClassifier(*args, **kwargs)
    module.configure_model()
    return module


def network(module: ImageClassifier) -> Any:
    assert module.net is not None
    return module.net


def state_of(arch: str = "resnet18", num_classes: int = NUM_CLASSES) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return models.get_model(arch, weights=None, num_classes=num_classes).state_dict()


# Networks


def test_resnet50_is_the_default_and_starts_with_residual_branches_at_zero() -> None:
    module = built(num_classes=NUM_CLASSES)
    assert isinstance(module.net, models.ResNet)
    assert sum(p.numel() for p in module.net.parameters()) == 23_508_032 + 2049 * NUM_CLASSES
    assert not network(module).layer1[0].bn3.weight.any()
    assert network(built("resnet18", num_classes=2, zero_init_residual=False)).layer1[0].bn2.weight.all()


def test_unknown_network_lists_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        ImageClassifier("resnet51")
    assert str(caught.value).startswith(
        "--model.arch must be a classification network of torchvision, got 'resnet51'; nearest: resnet50, resnet"
    )
    with pytest.raises(UserError, match="known: alexnet, convnext_base"):
        ImageClassifier("x")


# One of every family whose final classifier is built in its own way.
FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2"),
]


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_final_classifier_is_found(arch: str, tmp_path: Path) -> None:
    # Without memory where the network can be built so: RegNet computes its widths with tensors.
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):
        net = build_network(arch, 5, zero_init_residual=True)
        published = build_network(arch, 7, zero_init_residual=True)
    wanted, theirs = ({k: _light(v) for k, v in side.state_dict().items()} for side in (net, published))
    torch.save(theirs, tmp_path / "w.pth")
    holder = _Holder(wanted)
    note = load_weights(holder, arch, str(tmp_path / "w.pth"))
    assert note is not None
    assert "is for 7 classes, so a fresh one for 5 stays" in note
    left = wanted.keys() - holder.loaded.keys()
    assert {name.rpartition(".")[0] for name in left} == {note.split("`")[1]}


def _light(tensor: Tensor) -> Tensor:
    """Of the same shape, in the memory of a single number."""
    return torch.zeros(()).expand(tensor.shape)


class _Holder(nn.Module):
    """Stands for a network without holding its weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state
        self.loaded: dict[str, Tensor] = {}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.loaded = dict(state_dict)


def test_channels_last_gives_the_same_logits() -> None:
    images = torch.randn(2, 3, 32, 32)
    plain, last = (built("resnet18", num_classes=3, channels_last=flag).eval() for flag in (False, True))
    assert network(last).layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain(images), last(images), atol=1e-4)


def test_building_twice_keeps_the_network() -> None:
    module = built(ARCH, num_classes=3)
    net = module.net
    module.configure_model()
    assert module.net is net


# Number of classes


def test_number_of_classes_comes_from_the_data(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = ImageClassifier(ARCH)
    make_trainer().validate(module, RandomImages(), verbose=False)
    assert module.num_classes == NUM_CLASSES
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, NUM_CLASSES)


def test_number_of_classes_by_flag(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = ImageClassifier(ARCH, num_classes=1000)
    make_trainer().validate(module, RandomImages(), verbose=False)
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_error_without_a_number_of_classes() -> None:
    with pytest.raises(UserError, match=r"--model.num_classes is needed"):
        ImageClassifier(ARCH).configure_model()


def test_error_with_too_few_classes(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.raises(UserError, match=f"--model.num_classes must be >= {NUM_CLASSES}, .* got 5"):
        make_trainer().validate(ImageClassifier(ARCH, num_classes=5), RandomImages(), verbose=False)


# Weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"net.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "wrapped", "DDP", "model", "ours"],
)
def test_weights_from_a_file(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    state = state_of()
    torch.save(wrap(state), tmp_path / "weights.pth")
    module = built("resnet18", weights=str(tmp_path / "weights.pth"), num_classes=NUM_CLASSES)
    assert all(torch.equal(value, state[key]) for key, value in network(module).state_dict().items())


def test_weights_of_before_2018_lack_a_counter(tmp_path: Path) -> None:
    torch.save({k: v for k, v in state_of().items() if "num_batches" not in k}, tmp_path / "old.pth")
    built("resnet18", weights=str(tmp_path / "old.pth"), num_classes=NUM_CLASSES)


def test_old_names_of_densenet(tmp_path: Path) -> None:
    state = state_of("densenet121")
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    built("densenet121", weights=str(tmp_path / "old.pth"), num_classes=NUM_CLASSES)


def test_weights_for_other_classes_keep_the_fresh_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, state = tmp_path / "resnet18.pth", state_of(num_classes=1000)
    torch.save(state, file)
    with caplog.at_level("INFO"):
        module = built("resnet18", weights=str(file), num_classes=NUM_CLASSES)
    note = f"weights {file}: the final classifier `fc` is for 1000 classes, so a fresh one for {NUM_CLASSES} stays"
    assert note in caplog.messages
    assert torch.equal(network(module).layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert network(module).fc.weight.shape == (NUM_CLASSES, 512)


def weights_error(arch: str, weights: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        built(arch, weights=str(weights), num_classes=NUM_CLASSES)
    return str(caught.value)


def test_error_with_weights_of_another_network(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(state_of("resnet18"), file)
    text = weights_error("resnet50", file)
    assert text.startswith(f"--model.weights {file} does not fit --model.arch resnet50: ")
    assert text.endswith("first `layer1.0.conv1.weight`: (64, 64, 3, 3) in the weights, (64, 64, 1, 1) in the network")
    assert "first `layer1.0.bn3.weight`" not in text
    missing = state_of("resnet18")
    del missing["layer2.0.bn1.bias"]
    torch.save(missing, file)
    assert weights_error("resnet18", file).endswith(
        "1 of 122 entries differ, first `layer2.0.bn1.bias`: missing in the weights, (128,) in the network"
    )
    torch.save(state_of("resnet18") | {"extra.weight": torch.zeros(2)}, file)
    assert weights_error("resnet18", file).endswith("`extra.weight`: (2,) in the weights, missing in the network")


def test_error_without_the_file(tmp_path: Path) -> None:
    file = tmp_path / "resnet50-0676ba61.pth"
    assert weights_error("resnet18", file) == f"--model.weights: no such file: {file}"
    assert weights_error("resnet18", "here.pth").startswith("--model.weights: no such file: /")


def test_error_with_a_file_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_text("no weights")
    assert weights_error("resnet18", file).startswith(f"--model.weights {file}: no file of plain weights: ")
    torch.save(nn.Linear(2, 2), file)  # a pickled object: code could hide in it
    assert weights_error("resnet18", file).startswith(f"--model.weights {file}: no file of plain weights: ")
    torch.save({"epoch": 3, "best": 0.7}, file)
    assert weights_error("resnet18", file) == (
        f"--model.weights {file}: expected a state dict (names to tensors), got a dict with epoch, best"
    )


def test_error_with_a_name_that_is_not_published() -> None:
    assert weights_error("resnet50", "IMAGENET1K_V3") == (
        "--model.weights IMAGENET1K_V3: no such file, and torchvision publishes no weights of that name for resnet50;"
        " it has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"
    )


def test_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of("resnet18", num_classes=1000)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: state)
    module = built("resnet18", weights="IMAGENET1K_V1", num_classes=NUM_CLASSES)
    assert torch.equal(network(module).conv1.weight, state["conv1.weight"])


def test_error_without_a_network_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_connection)
    text = weights_error("resnet18", "DEFAULT")
    assert text.startswith("--model.weights DEFAULT: cannot download https://download.pytorch.org/models/resnet18-")
    assert "give the file's path to --model.weights" in text


def _no_connection(*args: Any, **kwargs: Any) -> None:
    from urllib.error import URLError

    raise URLError("no route to host")


# Figures


def test_accuracy_is_percent_of_all_samples() -> None:
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])
    labels = torch.tensor([0, 1, 2, 2])
    for top_k, expected in ((1, 50.0), (2, 75.0), (5, 100.0)):  # of 3 classes, the top 5 are all
        accuracy = PercentCorrect(3, top_k)
        accuracy.update(logits[:3], labels[:3])
        accuracy.update(logits[3:], labels[3:])
        assert accuracy.compute().item() == expected


def test_mean_loss_weighs_batches_by_size() -> None:
    loss = MeanLoss()
    loss.update(torch.tensor(1.0), 3)
    loss.update(torch.tensor(5.0), 1)
    assert loss.compute().item() == 2.0


class _StepLosses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        assert trainer.callback_metrics["train/loss"] == outputs["loss"]
        self.losses.append(outputs["loss"].item())


def test_figures_of_fit_and_test(make_trainer: Callable[..., pl.Trainer]) -> None:
    module, data, steps = ImageClassifier(ARCH), RandomImages(), _StepLosses()
    trainer = make_trainer(callbacks=[steps])
    trainer.fit(module, data)
    net = module.net
    metrics = trainer.callback_metrics
    assert metrics["train/loss_epoch"].item() == pytest.approx(sum(steps.losses[2:]) / 2)
    assert metrics["train/top1"].item() % 12.5 == 0
    trainer.test(module, data, verbose=False)
    assert module.net is net
    tested = trainer.callback_metrics
    for name in ("loss", "top1", "top5"):
        assert tested[f"test/{name}"] == metrics[f"val/{name}"]
    batches = list(data.val_dataloader())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    assert tested["test/loss"].item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert tested["test/top1"].item() == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert tested["test/top5"].item() == pytest.approx(100 * top5)


def test_predictions(make_trainer: Callable[..., pl.Trainer]) -> None:
    batches: Any = make_trainer().predict(ImageClassifier(ARCH), RandomImages())
    probabilities = torch.cat([batch["probabilities"] for batch in batches])
    assert probabilities.shape == (10, NUM_CLASSES)
    assert torch.allclose(probabilities.sum(1), torch.ones(10))
    assert torch.equal(torch.cat([batch["predicted"] for batch in batches]), probabilities.argmax(1))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [*range(6), *range(4)]


# Checkpoints


def test_a_checkpoint_needs_neither_data_nor_the_file_of_weights(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    file = tmp_path / "start.pth"
    torch.save(state_of(ARCH), file)
    module = ImageClassifier(ARCH, weights=str(file))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, RandomImages())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert module.hparams["weights"] == str(file)
    file.unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.num_classes == NUM_CLASSES
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert weights_error("resnet18", tmp_path / "end.ckpt").startswith("--model.weights")  # readable as weights, too
    built(ARCH, weights=str(tmp_path / "end.ckpt"), num_classes=NUM_CLASSES)


# Optimizer and schedule


def factors(schedule: Schedule, total: int, warmup: int | None = None) -> list[float]:
    factor = learning_rate_factor(schedule, total, warmup)
    return [factor(step) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_schedules_rise_from_a_25th_to_the_peak(schedule: Schedule) -> None:
    values = factors(schedule, 100, 20)
    assert values[0] == pytest.approx(1 / 25)
    assert values[20] == 1.0
    assert values[:21] == sorted(values[:21])


def test_schedules_end_at_zero_or_stay() -> None:
    for values in (factors("one_cycle", 100), factors("cosine", 100)):
        peak = values.index(1.0)
        assert values[peak:] == sorted(values[peak:], reverse=True)
        assert values[100] == pytest.approx(0, abs=1e-9)
    assert factors("one_cycle", 100).index(1.0) == 30
    assert factors("cosine", 100)[50] == pytest.approx(0.5)
    assert factors("constant", 100) == [1.0] * 101


def test_schedules_of_very_short_runs_are_finite() -> None:
    for total in (0, 1, 2, 3):
        for warmup in (None, 0, 5):
            assert all(0 <= value <= 1 for value in factors("one_cycle", total, warmup))


def rates_of_a_run(trainer: pl.Trainer, module: ImageClassifier) -> list[float]:
    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    trainer.callbacks.append(Rates())
    trainer.fit(module, RandomImages())
    return rates


def test_the_schedule_advances_with_every_step(make_trainer: Callable[..., pl.Trainer]) -> None:
    trainer = make_trainer(max_epochs=3, limit_val_batches=0)
    rates = rates_of_a_run(trainer, ImageClassifier(ARCH, schedule="cosine", warmup_epochs=1))
    expected = learning_rate_factor("cosine", 6, 2)
    assert rates == pytest.approx([0.05 * expected(step) for step in range(6)])


def test_an_own_scheduler_advances_with_every_epoch(make_trainer: Callable[..., pl.Trainer]) -> None:
    def halve(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    trainer = make_trainer(max_epochs=3, limit_val_batches=0)
    rates = rates_of_a_run(trainer, ImageClassifier(ARCH, lr_scheduler=halve))
    assert rates == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125])


def test_error_with_a_schedule_without_an_end(make_trainer: Callable[..., pl.Trainer]) -> None:
    trainer = make_trainer(max_epochs=-1, max_steps=-1, limit_val_batches=0)
    with pytest.raises(UserError, match=r"--model.schedule one_cycle needs an end: set --trainer.max_epochs or"):
        trainer.fit(ImageClassifier(ARCH), RandomImages())


def test_error_with_an_unknown_schedule() -> None:
    wrong: Any = "linear"
    with pytest.raises(ValueError, match=r"--model.schedule must be one of one_cycle, cosine, constant, got 'linear'"):
        learning_rate_factor(wrong, 10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse has a new name for what Lightning calls
@pytest.mark.parametrize("subclass_mode", [False, True])
def test_flags(subclass_mode: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gradsync"])

    def parsed(*flags: str) -> Any:
        model: Any = pl.LightningModule if subclass_mode else ImageClassifier
        name = ["--model", "gradsync.modules.ImageClassifier"] if subclass_mode else []
        return LightningCLI(
            model,
            RandomImages,
            run=False,
            args=[*name, *flags],
            auto_configure_optimizers=False,
            subclass_mode_model=subclass_mode,
            save_config_callback=None,
            seed_everything_default=False,
        )

    def optimizer_of(*flags: str) -> torch.optim.Optimizer:
        return parsed(*flags).model.optimizer([nn.Parameter(torch.zeros(1))])

    default = optimizer_of()
    assert isinstance(default, torch.optim.SGD)
    wanted = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "fused": True}
    assert wanted.items() <= default.param_groups[0].items()
    assert optimizer_of("--model.optimizer.lr", "0.2").param_groups[0]["lr"] == 0.2
    assert isinstance(optimizer_of("--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3"), torch.optim.AdamW)
    model = parsed("--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "2").model
    assert model.lr_scheduler(default).step_size == 2
    with pytest.raises(SystemExit):
        parsed("--print_config")
    assert "schedule: one_cycle" in capsys.readouterr().out


def test_the_defaults_can_be_pickled_by_value_of_hparams() -> None:
    hparams = ImageClassifier(ARCH, num_classes=3).hparams
    assert "optimizer" not in hparams
    assert all(isinstance(value, str | int | float | bool | None) for value in hparams.values())
    assert not any(isinstance(value, float) and math.isnan(value) for value in hparams.values())
