"""A NaN gradient on one rank: all ranks leave the step out, or stop, and no weight or checkpoint ever has it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import gradsync, tiny_fit
from distributed import run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet

from gradsync.callbacks import NonfiniteGuard
from gradsync.callbacks.nonfinite_guard import _is_any_nonfinite
from gradsync.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:step .* left out"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
STRATEGIES = {"ddp": 2, "manual_allreduce": 3, "sharded_server": 3, "parameter_server": 3}


class Spoiled(Mlp):
    """One rank's gradient is NaN in one step: of the loss, or only in the backward pass, or of the input.

    Args:
        how: ``loss``, ``backward`` (of the first layer alone) or ``input`` (through BatchNorm).
        at: Global steps.
    """

    def __init__(self, how: str = "loss", rank: int = 1, at: tuple[int, ...] = (2,), **options: Any) -> None:
        super().__init__(batch_norm=True, **options)
        self.how, self.rank, self.at = how, rank, at

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.global_rank != self.rank or self.trainer.global_step not in self.at:
            return super().training_step(batch, index)
        if self.how == "input":
            batch = (batch[0] * torch.nan, batch[1])
        loss = super().training_step(batch, index)
        if self.how == "backward":
            weight = self.net[0].weight
            loss = loss + (weight * 0).abs().sqrt().sum() * 0  # the root's slope at 0 is infinite
        return loss * torch.nan if self.how == "loss" else loss


def _fit(rank: int, strategy: str, world: int, how: str, options: dict[str, Any], folder: str) -> Any:
    quiet()
    warnings.filterwarnings("ignore", message="step .* left out")
    torch.manual_seed(0)
    guard = NonfiniteGuard("skip")
    model = Spoiled(how)
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    trainer = make_trainer(
        make_strategy(strategy, options), world, max_steps=5, callbacks=[guard, saving], enable_checkpointing=True
    )
    trainer.fit(model, DataLoader(make_data(), batch_size=8))
    finite = all(bool(v.isfinite().all()) for v in model.state_dict().values())
    return finite, guard.skipped, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("how", ["loss", "backward", "input"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_is_left_out_on_all_ranks(strategy: str, how: str, tmp_path: Path) -> None:
    results = run_distributed(_fit, STRATEGIES[strategy], strategy, STRATEGIES[strategy], how, {}, str(tmp_path))
    trained = results[1:] if strategy == "parameter_server" else results
    assert all(finite for finite, _, _ in results)
    assert [skipped for _, skipped, _ in trained] == [[2]] * len(trained)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def _fit_without(rank: int, strategy: str, world: int, at: tuple[int, ...], on_nonfinite: str) -> Any:
    """Loss and gradient of one rank are NaN in steps ``at``; the other runs never see that batch's gradient."""
    quiet()
    torch.manual_seed(0)
    model = Spoiled("loss", at=at, optimizer="adamw")
    trainer = make_trainer(strategy, world, max_steps=4, callbacks=[NonfiniteGuard(on_nonfinite)])  # pyright: ignore
    trainer.fit(model, DataLoader(make_data(), batch_size=8))
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "sharded_server"])
def test_a_guard_that_finds_nothing_changes_nothing(strategy: str) -> None:
    skip, ignore = (run_distributed(_fit_without, 2, strategy, 2, (), how) for how in ("skip", "ignore"))
    for a, b in zip(skip, ignore, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_the_guard_the_weights_are_lost() -> None:
    (state, _) = run_distributed(_fit_without, 2, "manual_allreduce", 2, (2,), "ignore")
    assert not all(value.isfinite().all() for value in state.values())


def test_async_workers_leave_out_their_own(tmp_path: Path) -> None:
    results = run_distributed(_fit, 3, "parameter_server", 3, "backward", {"mode": "async"}, str(tmp_path))
    assert all(finite for finite, _, _ in results)
    assert sorted(len(skipped) for _, skipped, _ in results[1:]) == [0, 1]


def test_it_stops_where_skipping_does_not_help() -> None:
    guard = NonfiniteGuard("skip")
    model = Spoiled("loss", rank=0, at=tuple(range(1000)))
    trainer = make_trainer("auto", 1, max_steps=100, max_epochs=-1, callbacks=[guard])
    with pytest.raises(UserError, match="as in the 24 steps before"):
        trainer.fit(model, DataLoader(make_data(), batch_size=8))
    assert len(guard.skipped) == 24


class _Overflows(Mlp):
    """Gradients stay finite, weights do not."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e38)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return sum((p.sum() * 10 for p in self.parameters()), torch.zeros(()))


def test_large_is_not_infinite() -> None:
    """Though its square is."""
    assert not _is_any_nonfinite([torch.full((3,), 3e38), torch.ones(2, dtype=torch.bfloat16)])
    assert _is_any_nonfinite([torch.ones(3), torch.tensor([1.0, torch.inf])])
    assert _is_any_nonfinite([torch.tensor([torch.nan], dtype=torch.float16)])
    assert not _is_any_nonfinite([torch.tensor([2**62]), torch.empty(0)])


def test_infinite_weights_are_not_saved(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = make_trainer("auto", 1, max_steps=2, callbacks=[NonfiniteGuard(), saving], enable_checkpointing=True)
    with pytest.raises(UserError, match="no such checkpoint is written"):
        trainer.fit(_Overflows(), DataLoader(make_data(), batch_size=8))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "parameter_server"])
def test_a_run_stops_and_names_rank_parameter_and_step(strategy: str, tmp_path: Path) -> None:
    arguments = tiny_fit(strategy, 2 + (strategy == "parameter_server"))
    arguments[arguments.index("--model") + 1] = "test_nonfinite_guard.Spoiled"
    ended = gradsync(*arguments, "--run_dir", "run", cwd=tmp_path)
    assert ended.code == 1, ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    assert len(said) == 1, said
    assert "step 2: the gradient of net.0.weight and of 7 more is NaN or infinite (on rank 1)" in said[0]
    assert "--on_nonfinite skip" in said[0]
    assert not ended.orphans
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_left_out_steps_are_in_the_result(tmp_path: Path) -> None:
    arguments = tiny_fit("manual_allreduce", 2)
    arguments[arguments.index("--model") + 1] = "test_nonfinite_guard.Spoiled"
    results = tmp_path / "results.json"
    ended = gradsync(*arguments, "--on_nonfinite", "skip", "--results", str(results), cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert json.loads(results.read_text())["skipped_steps"] == [2]
    assert "step left out, 1 so far" in ended.output


def test_a_module_that_is_not_its_networks_root_is_looked_at(tmp_path: Path) -> None:
    """Parameters without a gradient, of another dtype or empty do not disturb."""
    model = Spoiled("loss", rank=0, at=(1,))
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    guard = NonfiniteGuard("skip")
    os.chdir(tmp_path)
    make_trainer("auto", 1, max_steps=3, callbacks=[guard]).fit(model, DataLoader(make_data(), batch_size=8))
    assert guard.skipped == [1]
