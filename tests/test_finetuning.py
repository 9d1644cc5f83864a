"""Freezing, unfreezing and new parameter groups in mid-run under the parameter server, and averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import RankFailed, run_distributed
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader
from training import NUM_CLASSES, Mlp, Traffic, make_data, make_strategy, make_trainer, quiet

EPOCHS = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 5, "num_sanity_val_steps": 0}
States = list[dict[str, Any]]


class Backbone(Mlp):
    """A backbone that no optimizer has at the start, and a head."""

    def __init__(self, optimizer: str, head_only: bool = True) -> None:
        super().__init__(optimizer=optimizer)
        self.backbone = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, NUM_CLASSES)
        self.net = nn.Sequential(self.backbone, self.head)
        self.head_only = head_only

    def configure_optimizers(self) -> Any:
        parameters = list((self.head if self.head_only else self).parameters())
        if self.kind == "adamw":
            return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


class Finetuning(BackboneFinetuning):
    """Lightning's leaves the backbone frozen when a run resumes after the epoch that unfroze it."""

    state_key = "finetuning"

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        super().finetune_function(pl_module, epoch, optimizer)
        if epoch > self.unfreeze_backbone_at_epoch:
            self.make_trainable(pl_module.backbone)


class FrozenAfterSetup(Finetuning):
    """DDP synchronizes what is trainable when it is set up, and nothing else: its reference freezes afterwards."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        super().on_fit_start(trainer, module)
        self.freeze_before_training(module)


class Flip(pl.Callback):
    """The backbone is trained in batches 3 to 9 and from 12 on. ``skip``: not at this rank."""

    def __init__(self, skip: int | None = None) -> None:
        self.skip = skip

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.backbone.requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        trained = 3 <= trainer.global_step < 9 or trainer.global_step >= 12
        module.backbone.requires_grad_(trained and self.skip != trainer.global_rank)


def _callbacks(what: str, strategy: str) -> list[Any]:
    backbone = FrozenAfterSetup if strategy == "ddp" else Finetuning
    made = {
        "backbone": lambda: backbone(1, verbose=False, backbone_initial_ratio_lr=0.5),
        "backbone_by_the_book": lambda: BackboneFinetuning(1, verbose=False),
        "flip": Flip,
        "flip_alone": lambda: Flip(skip=1),
        "ema": lambda: EMAWeightAveraging(decay=0.8),
        "ema_no_buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
        "mean": WeightAveraging,
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
        "none": lambda: None,
    }
    return [callback for callback in [made[what]()] if callback is not None]


def _fit(
    rank: int,
    strategy: str,
    processes: int,
    what: str,
    optimizer: str = "sgd",
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    folder: str | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    quiet()
    pl.seed_everything(1, verbose=False)
    if rank != (options or {}).get("servers", 0):  # all start from the first trainer's values, the servers too
        torch.manual_seed(50 + rank)
    module = Backbone(optimizer, head_only=what.startswith("backbone"))
    callbacks = _callbacks(what, strategy)
    if what.startswith("flip") and strategy != "ddp":
        module.backbone.requires_grad_(False)
    if strategy == "ddp":
        options = {"find_unused_parameters": True}
    traffic = Traffic()
    if folder is not None:
        callbacks.append(ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1))
    runner = make_trainer(
        make_strategy(strategy, options),
        processes,
        **{**EPOCHS, "enable_checkpointing": folder is not None, **(trainer or {})},
        callbacks=[*callbacks, traffic],
    )
    loader = DataLoader(make_data(), batch_size=8)
    runner.fit(module, loader, loader, ckpt_path=resume)
    state = {name: value.clone() for name, value in module.state_dict().items() if not name.startswith("net.")}
    metrics = {f"metric {name}": v for name, v in runner.callback_metrics.items() if name != "loss"}
    return {**state, **metrics, "bytes": traffic.bytes}


def _run(strategy: str, what: str, *args: Any, servers: int = 1, trainers: int = 2, **options: Any) -> States:
    processes = trainers + (servers if strategy == "parameter_server" else 0)
    if strategy == "parameter_server":
        options["servers"] = servers
    optimizer, *more = args or ("sgd",)
    return run_distributed(_fit, processes, strategy, processes, what, optimizer, options, *more)


def _assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if name != "bytes" and not torch.equal(a[name], b[name])]


_references: dict[Any, States] = {}


def _ddp(what: str, *args: Any) -> States:
    key = (what, repr(args))
    if key not in _references:
        _references[key] = _run("ddp", what, *args)
    return _references[key]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("what", ["backbone", "flip"])
def test_what_is_unfrozen_in_mid_run_is_trained_as_under_ddp_to_the_bit(what: str, optimizer: str) -> None:
    ours, reference = _run("parameter_server", what, optimizer), _ddp(what, optimizer)
    untrained = _run("ddp", "none", optimizer, {"max_epochs": 0})[0]
    assert not torch.equal(reference[0]["backbone.0.weight"], untrained["backbone.0.weight"])
    _assert_same(ours[0], reference[0])  # the server's process
    for rank in range(2):
        _assert_same(ours[1 + rank], reference[rank])


@pytest.mark.parametrize(
    "options",
    [*({"transport": name} for name in ("ipc", "naive", "collective")), {"share_parameters": True}],
    ids=lambda options: str(*options.values()),
)
@pytest.mark.parametrize("what", ["backbone", "flip"])
def test_every_transport_takes_in_what_is_unfrozen(what: str, options: dict[str, Any]) -> None:
    _assert_same(_run("parameter_server", what, **options)[1], _ddp(what, "sgd")[0])


@pytest.mark.parametrize("what", ["backbone", "flip"])
def test_what_is_unfrozen_travels_rounded_and_is_kept_unrounded(what: str) -> None:
    sockets, shared = (_run("parameter_server", what, wire_dtype="bfloat16", transport=t) for t in ("ipc", "auto"))
    _assert_same(sockets[1], shared[1])
    weight = shared[0]["backbone.0.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    # bfloat16 keeps 8 bits: gradients of below 1 are off by 2e-3 at most, steps of 0.1 and momentum 0.9 add up
    torch.testing.assert_close(weight, _ddp(what, "sgd")[0]["backbone.0.weight"], rtol=0, atol=0.05)


@pytest.mark.parametrize("what", ["backbone", "flip"])
def test_two_servers_take_in_what_is_unfrozen(what: str) -> None:
    ours = _run("parameter_server", what, "adamw", servers=2, part_mib=0.001)
    _assert_same(ours[0], _ddp(what, "adamw")[0])
    _assert_same(ours[3], _ddp(what, "adamw")[1])


def test_frozen_parameters_do_not_travel() -> None:
    """Sent and received; what is frozen again only stops travelling, and so does what was frozen at the start."""
    num_bytes = _run("parameter_server", "flip")[1]["bytes"]
    module = Backbone("sgd")
    head, backbone = (2 * sum(p.nbytes for p in part.parameters()) for part in (module.head, module.backbone))
    assert num_bytes == [head] * 3 + [head + backbone] * 6 + [head] * 3 + [head + backbone] * 3


def test_workers_that_unfreeze_different_parameters_are_told_so() -> None:
    with pytest.raises(RankFailed, match="unfreeze on all workers between the same two steps"):
        _run("parameter_server", "flip_alone")


@pytest.mark.parametrize("what", ["backbone", "flip"])
@pytest.mark.parametrize(("transport", "servers"), [("shared_memory", 1), ("ipc", 2)])
def test_async_mode_takes_in_what_is_unfrozen(what: str, transport: str, servers: int) -> None:
    trainer = {"max_epochs": 6}
    ours = _run("parameter_server", what, "adamw", trainer, servers=servers, mode="async", transport=transport)
    untrained = _run("ddp", "none", "adamw", {"max_epochs": 0})[0]
    for state in ours[servers:]:
        weights = {name: v for name, v in state.items() if name.endswith(("weight", "bias")) and "metric" not in name}
        _assert_same({name: ours[0][name] for name in weights}, weights)
    for name in ("backbone.0.weight", "backbone.3.weight", "head.weight"):
        assert not torch.equal(ours[0][name], untrained[name])
    assert ours[0]["metric val/loss"] < 0.8


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_async_with_one_worker_equals_plain_training(mode: str) -> None:
    ours = _run("parameter_server", "flip", "adamw", mode=mode, trainers=1)
    _assert_same(ours[0], _run("ddp", "flip", "adamw", trainers=1)[0])


def test_ddp_does_not_synchronize_what_is_unfrozen_after_its_set_up() -> None:
    """Why the references here freeze late, and what the docs say of it."""
    first, second = _run("ddp", "backbone_by_the_book")
    assert torch.equal(first["head.weight"], second["head.weight"])
    assert not torch.equal(first["backbone.0.weight"], second["backbone.0.weight"])
    ours = _run("parameter_server", "backbone_by_the_book")
    assert torch.equal(ours[1]["backbone.0.weight"], ours[2]["backbone.0.weight"])


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["backbone", "flip"])
@pytest.mark.parametrize(
    ("saver", "loader"), [((1, "parameter_server"), (2, "parameter_server")), ((2, "parameter_server"), (0, "ddp"))]
)
def test_a_run_resumes_after_unfreezing(what: str, saver: Any, loader: Any, tmp_path: Path) -> None:
    """Under another number of servers and under DDP, to the bit as if uninterrupted."""
    part = {"part_mib": 0.001}
    _run(saver[1], what, "adamw", {"max_epochs": 2}, str(tmp_path), servers=saver[0], **part)
    options = part if loader[1] == "parameter_server" else {}
    resumed = _run(
        loader[1],
        what,
        "adamw",
        None,
        str(tmp_path / "b"),
        str(tmp_path / "epoch=1.ckpt"),
        servers=loader[0],
        **options,
    )
    _assert_same(resumed[-1], _ddp(what, "adamw")[-1])


# -- averaged weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["ema", "ema_no_buffers", "mean", "swa"])
def test_averaged_weights_are_those_of_ddp(what: str, tmp_path: Path) -> None:
    """Validated, left in every process, and saved."""
    ours = _run("parameter_server", what, "sgd", None, str(tmp_path / "ours"))
    reference = _run("ddp", what, "sgd", None, str(tmp_path / "ddp"))
    plain = _ddp("none", "sgd")
    assert not torch.equal(reference[0]["head.weight"], plain[0]["head.weight"])
    _assert_same(ours[0], reference[0])
    for rank in range(2):
        _assert_same(ours[1 + rank], reference[rank])
    saved, expected = (
        torch.load(tmp_path / folder / "epoch=2.ckpt", weights_only=False)["state_dict"] for folder in ("ours", "ddp")
    )
    _assert_same(saved, expected)


def test_averaged_weights_with_two_servers_and_on_resume(tmp_path: Path) -> None:
    whole = _run("parameter_server", "ema", "adamw", None, str(tmp_path), servers=2)
    saved = str(tmp_path / "epoch=0.ckpt")
    resumed = _run("parameter_server", "ema", "adamw", None, str(tmp_path / "b"), saved, servers=1)
    _assert_same(whole[0], _ddp("ema", "adamw")[0])
    _assert_same(resumed[0], whole[0])


@pytest.mark.parametrize("what", ["ema", "swa"])
def test_averaged_weights_are_refused_in_async_mode(what: str) -> None:
    with pytest.raises(RankFailed, match=r"mode async does not work with \w+: use --trainer.strategy.mode sync"):
        _run("parameter_server", what, mode="async")


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("parameter_server", {"share_parameters": True}),
        ("parameter_server", {"wire_dtype": "bfloat16"}),
        ("sharded_server", {"share_parameters": True}),
    ],
)
def test_averaged_weights_are_refused_where_swapping_them_would_go_wrong(strategy: str, options: Any) -> None:
    with pytest.raises(RankFailed, match=r"does not work with EMAWeightAveraging: leave it out"):
        _run(strategy, "ema", **options)
