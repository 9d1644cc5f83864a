"""``--max_restarts``: a run that fails is started again from its newest checkpoint, under every strategy."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import Ended, gradsync, run_command, tiny_fit
from faulty import AGAIN_AT, KILLED_AT

STEPS, EVERY = 8, 3
BOUND_S = 15.0
"""From the kill to the next step, R3."""


def _fit(strategy: str, processes: int, folder: Path, *flags: object, **faults: object) -> Ended:
    fit = tiny_fit(strategy, processes, **faults)
    fit[fit.index("--trainer.max_epochs") + 1] = "2"
    fit[fit.index("--model") + 1] = "faulty.FaultyOnImages"
    fit[fit.index("--data") :] = ["--data.image_size", "8", "--data.batch_size", "8"]  # goes on in mid-epoch
    own = ["--trainer.limit_train_batches", str(STEPS // 2), "--trainer.limit_val_batches", "2", "--run_dir", "run"]
    return gradsync(*fit, *own, "--snapshot_every_n_steps", str(EVERY), *map(str, flags), cwd=folder)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]


@cache
def _uninterrupted(folder: Path, strategy: str, processes: int, *flags: str) -> dict[str, torch.Tensor]:
    where = folder / "-".join([strategy, *flags])
    where.mkdir()
    ended = _fit(strategy, processes, where, *flags)
    assert ended.code == 0, ended.output
    return _weights(where)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted")


def _assert_restarted(ended: Ended, lost: int, of: int) -> None:
    assert ended.code == 0, ended.output
    assert "restart 1 of 1: goes on" in ended.output
    assert f"; {lost} of {of} updates are lost" in ended.output, ended.output
    killed, again = (float(re.findall(rf"{text}([\d.]+)", ended.output)[0]) for text in (KILLED_AT, AGAIN_AT))
    assert again - killed < ended.busy.bound_s(BOUND_S, killed)
    assert not ended.orphans


@pytest.mark.parametrize("step", range(STEPS))
def test_a_server_killed_at_any_step_changes_nothing(step: int, shared: Path, tmp_path: Path) -> None:
    ended = _fit("parameter_server", 3, tmp_path, "--max_restarts", 1, fault="kill_server_once", at_step=step)
    saved = max(n for n in (0, 3, 4, 6) if n <= step)  # every third step, and the end of an epoch of 4
    _assert_restarted(ended, step - saved, step)
    assert "server 0 was killed by SIGKILL" in ended.output
    expected = _uninterrupted(shared, "parameter_server", 3)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(tmp_path).items())


@pytest.mark.parametrize(
    ("strategy", "processes", "flags"),
    [
        ("ddp", 2, []),
        ("manual_allreduce", 2, []),
        ("sharded_server", 2, []),
        ("parameter_server", 4, ["--trainer.strategy.servers", "2"]),
    ],
)
def test_a_killed_rank_changes_nothing(
    strategy: str, processes: int, flags: list[str], shared: Path, tmp_path: Path
) -> None:
    last = {"fault": "kill_once", "process": processes - 1, "at_step": 5}
    ended = _fit(strategy, processes, tmp_path, "--max_restarts", 1, *flags, **last)
    _assert_restarted(ended, 1, 5)
    expected = _uninterrupted(shared, strategy, processes, *flags)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(tmp_path).items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.strategy.mode", "async"],
        ["--trainer.strategy.mode", "async", "--trainer.strategy.servers", "2"],
        ["--trainer.strategy.mode", "bounded"],
        ["--trainer.strategy.on_worker_loss", "continue"],
    ],
)
def test_a_killed_server_costs_updates_that_are_counted(flags: list[str], tmp_path: Path) -> None:
    processes = 4 if "2" in flags else 3
    fault = {"fault": "kill_server_once", "process": processes - 2, "at_step": 5, "server": processes - 3}
    ended = _fit("parameter_server", processes, tmp_path, "--max_restarts", 1, *flags, **fault)
    lost, made = map(int, re.findall(r"; (\d+) of (\d+) updates are lost", ended.output)[0])
    _assert_restarted(ended, lost, made)
    each = 1 if "continue" in flags else 2
    assert 5 <= made <= each * STEPS
    assert lost < each * EVERY + 8  # and what the second worker was ahead
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == STEPS


def test_who_fails_at_the_same_step_again_is_not_tried_a_third_time(tmp_path: Path) -> None:
    ended = _fit("manual_allreduce", 2, tmp_path, "--max_restarts", 5, fault="raise", at_step=1)
    assert ended.code == 1
    assert "restart 1 of 5" in ended.output
    assert "not started again: update 1 was the last one before, too" in ended.output
    assert not ended.orphans


def test_who_fails_before_the_first_step_is_not_started_again(tmp_path: Path) -> None:
    ended = _fit("manual_allreduce", 2, tmp_path, "--max_restarts", 5, "--data.batch_size", 0)
    assert ended.code != 0
    assert "restart" not in ended.output


def test_who_is_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    fit = [*tiny_fit("manual_allreduce", 2), "--run_dir", "run", "--max_restarts", "3", "--progress_every_n_steps", "5"]
    fit[fit.index("--trainer.max_epochs") + 1] = "100000"
    ended = gradsync(*fit, cwd=tmp_path, interrupt_at="epoch 2/")
    assert ended.code == 130, ended.output
    assert "restart" not in ended.output
    assert not ended.orphans


def test_torchrun_restarts_by_itself(tmp_path: Path) -> None:
    fit = tiny_fit("manual_allreduce", 2)
    command = [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "gradsync"],
        *fit,
    ]
    ended = run_command([*command, "--max_restarts", "1"], tmp_path)
    assert ended.code != 0
    assert "give it to torchrun, as --max-restarts" in ended.output
