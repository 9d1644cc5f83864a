"""Life of a run under each strategy: several fits, fit then test, checkpoints, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, num_processes, quiet, train, trainers_only

STRATEGIES = ["ddp", "manual_allreduce", "parameter_server", "sharded_server"]
MODEL = {"optimizer": "adamw", "batch_norm": True}
CLIPPING: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.5},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def _run(strategy: str, fn: Any, *args: Any, trainers: int = 2) -> list[Any]:
    processes = num_processes(strategy, trainers)
    return run_distributed(fn, processes, strategy, processes, *args)


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def _train_with_checkpoints(
    rank: int, strategy: str, devices: int, folder: str, epochs: int, resume: str | None, clip: str = "norm"
) -> Any:
    callback = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    options = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True, "callbacks": [callback]}
    state = train(rank, strategy, devices, MODEL, {**options, **CLIPPING[clip]}, None, resume)
    return state, callback.best_model_path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_at_the_end_of_an_epoch_continues_as_if_uninterrupted(strategy: str, tmp_path: Path) -> None:
    whole = _run(strategy, _train_with_checkpoints, str(tmp_path / "whole"), 3, None)
    saved = str(tmp_path / "whole" / "epoch=0.ckpt")
    resumed = _run(strategy, _train_with_checkpoints, str(tmp_path / "resumed"), 3, saved)
    for (a, _), (b, _) in zip(resumed, whole, strict=True):
        _assert_same(a, b)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ("parameter_server", "ddp"),
        ("manual_allreduce", "parameter_server"),
        ("manual_allreduce", "sharded_server"),
        ("sharded_server", "manual_allreduce"),
    ],
)
def test_a_checkpoint_of_one_strategy_resumes_under_another(saver: str, loader: str, tmp_path: Path) -> None:
    clip = "value" if "sharded_server" in (saver, loader) else "norm"  # whose norm is DDP's within rounding only
    _run(saver, _train_with_checkpoints, str(tmp_path), 1, None, clip)
    other = _run(loader, _train_with_checkpoints, str(tmp_path / "b"), 2, str(tmp_path / "epoch=0.ckpt"), clip)
    whole = _run("ddp", _train_with_checkpoints, str(tmp_path / "c"), 2, None, clip)
    _assert_same(trainers_only(loader, other)[0][0], whole[0][0])


def test_the_server_process_knows_the_checkpoint_of_worker_zero(tmp_path: Path) -> None:
    results = _run("parameter_server", _train_with_checkpoints, str(tmp_path), 1, None)
    assert {path for _, path in results} == {str(tmp_path / "epoch=0.ckpt")}


def _fit_twice_then_test(rank: int, strategy: str, devices: int, options: dict[str, Any] | None = None) -> Any:
    quiet()
    pl.seed_everything(3, verbose=False)
    module = Mlp(batch_norm=True)
    loader = DataLoader(make_data(160), batch_size=8)
    trainer = make_trainer(make_strategy(strategy, options), devices, max_steps=5)
    trainer.fit(module, loader)
    again = make_trainer(make_strategy(strategy, options), devices, max_steps=8)
    again.fit(module, loader)
    tested = again.test(module, loader, verbose=False)
    validated = again.validate(module, loader, verbose=False)
    return {name: value.clone() for name, value in module.state_dict().items()}, tested, validated


@pytest.mark.parametrize("strategy", ["manual_allreduce", "parameter_server", "sharded_server"])
def test_several_fits_then_test_in_one_script(strategy: str) -> None:
    ours = _run(strategy, _fit_twice_then_test)
    reference = _run("ddp", _fit_twice_then_test)
    _assert_same(trainers_only(strategy, ours)[0][0], reference[0][0])
    for _, tested, validated in ours:  # the server's process gets worker 0's results
        assert tested[0]["val/loss"] == pytest.approx(reference[0][1][0]["val/loss"], rel=1e-6)
        assert tested == validated


@pytest.mark.parametrize("options", [{"transport": "collective"}, {"wire_dtype": "bfloat16"}])
def test_several_fits_with_other_ways_of_travelling(options: dict[str, Any]) -> None:
    ours = _run("parameter_server", _fit_twice_then_test, options)
    _assert_same(ours[0][0], ours[1][0])
    assert all(tested == validated == ours[0][1] for _, tested, validated in ours)


def _ranks_seen(rank: int, strategy: str, devices: int) -> Any:
    quiet()
    trainer = make_trainer(make_strategy(strategy), devices, max_steps=2)
    trainer.fit(Mlp(), DataLoader(make_data(64), batch_size=8))
    return trainer.world_size, trainer.global_rank, trainer.is_global_zero


def test_lightnings_world_is_the_workers() -> None:
    assert _run("parameter_server", _ranks_seen, trainers=3) == [
        (3, 3, False),
        (3, 0, True),
        (3, 1, False),
        (3, 2, False),
    ]


def _unfreeze_in_mid_run(rank: int, strategy: str, devices: int) -> Any:
    quiet()
    pl.seed_everything(3, verbose=False)

    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            module.net[0].requires_grad_(index >= 4)

    module = Mlp()
    trainer = make_trainer(make_strategy(strategy), devices, max_steps=8, callbacks=[Unfreeze()])
    module.net[0].requires_grad_(False)
    trainer.fit(module, DataLoader(make_data(), batch_size=8))
    return module.net[0].weight.detach().clone()


def test_all_reduce_takes_in_what_is_unfrozen_in_mid_run() -> None:
    first, second = _run("manual_allreduce", _unfreeze_in_mid_run)
    pl.seed_everything(3, verbose=False)
    assert torch.equal(first, second)
    assert not torch.equal(first, Mlp().net[0].weight)
