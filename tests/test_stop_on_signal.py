"""A signal to whichever process: a checkpoint after the same step on all ranks, the right code, nobody left."""

from __future__ import annotations

import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import Ended, gradsync, run_command, tiny_fit
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_trainer

from gradsync.callbacks import StopOnSignal
from gradsync.comm.stop import StopAgreement
from gradsync.errors import StoppedBySignal
from gradsync.strategies.store_control_plane import StoreControlPlane

RUNS = {"ddp": 2, "manual_allreduce": 3, "sharded_server": 2, "parameter_server": 3}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


def _endless(strategy: str, devices: int) -> list[str]:
    arguments = tiny_fit(strategy, devices)
    arguments[arguments.index("--trainer.max_epochs") + 1] = "1000000"
    return [*arguments, "--run_dir", "run", "--progress_every_n_steps", "5"]


def _stop(arguments: list[str], cwd: Path, number: signal.Signals, target: str) -> Ended:
    return run_command([sys.executable, "-m", "gradsync", *arguments], cwd, signal_at=("epoch 2/", number, target))


@pytest.mark.parametrize(
    ("strategy", "target"),
    [
        *(("ddp", "1"), ("ddp", "launcher"), ("manual_allreduce", "group"), ("manual_allreduce", "0")),
        *(("sharded_server", "launcher"), ("parameter_server", "group"), ("parameter_server", "1")),
    ],
)
def test_sigterm_saves_and_ends_all(strategy: str, target: str, tmp_path: Path) -> None:
    ended = _stop(_endless(strategy, RUNS[strategy]), tmp_path, signal.SIGTERM, target)
    assert ended.code == 143, ended.output
    assert not ended.orphans
    assert "Traceback" not in ended.output, ended.output
    stopped = re.search(r"stopped by SIGTERM after step (\d+): saved \S+run/checkpoints/last\.ckpt", ended.output)
    assert stopped, ended.output
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == int(stopped.group(1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_have_their_codes(number: signal.Signals, tmp_path: Path) -> None:
    ended = _stop(_endless("manual_allreduce", 2), tmp_path, number, "group")
    assert ended.code == CODES[number], ended.output
    assert f"stopped by {number.name}" in ended.output
    assert not ended.orphans


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_workers_that_go_at_their_own_pace_stop_too(mode: str, tmp_path: Path) -> None:
    arguments = [*_endless("parameter_server", 4), "--trainer.strategy.mode", mode]
    ended = _stop(arguments, tmp_path, signal.SIGTERM, "2")
    assert ended.code == 143, ended.output
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not ended.orphans


def test_a_stopped_run_goes_on_from_there(tmp_path: Path) -> None:
    ended = _stop(_endless("manual_allreduce", 2), tmp_path, signal.SIGTERM, "1")
    assert ended.code == 143, ended.output
    steps = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    arguments = [*_endless("manual_allreduce", 2), "--ckpt_path", "last", "--trainer.max_steps", str(steps + 3)]
    resumed = gradsync(*arguments, cwd=tmp_path)
    assert resumed.code == 0, resumed.output
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps + 3


def test_a_fit_in_another_thread_hears_nothing_and_trains(tmp_path: Path) -> None:
    trainer = make_trainer("auto", 1, max_steps=2, callbacks=[StopOnSignal()], default_root_dir=str(tmp_path))
    points = DataLoader(make_data(), batch_size=8)
    thread = threading.Thread(target=trainer.fit, args=(Mlp(), points, points))
    thread.start()
    thread.join()
    assert trainer.global_step == 2


def test_who_waits_for_workers_that_have_stopped_stops_too() -> None:
    """One may be at the end of its epoch when the others, in the middle of theirs, hear of the signal."""
    store = dist.HashStore()
    agreement = StopAgreement(store, 0, None)
    plane = StoreControlPlane(store, 1, 2, 60.0, lambda: b"", agreement.decided)
    agreement.ask(signal.SIGTERM)
    assert agreement.due(1) == signal.SIGTERM
    with pytest.raises(StoppedBySignal):
        plane.barrier()
