"""A run that is started again goes on: by torchrun after a fault, by SLURM after a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_command, tiny_fit
from distributed import free_port

TESTS = Path(__file__).parent


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("manual_allreduce", 2), ("parameter_server", 3)])
def test_torchrun_restarts_and_the_run_goes_on(strategy: str, processes: int, tmp_path: Path) -> None:
    """Lightning's DDP by itself hangs in the second attempt."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --max-restarts=1".split()
    fit = tiny_fit(strategy, processes, fault="kill_once", process=processes - 1, at_step=13)
    for flag in ("--trainer.devices", "--trainer.max_epochs"):
        del fit[fit.index(flag) : fit.index(flag) + 2]
    again = ["--trainer.max_epochs", "5", "--run_dir", "run", "--ckpt_path", "last"]
    ended = run_command([sys.executable, *launcher, "-m", "gradsync", *fit, *again], tmp_path)
    assert ended.code == 0, ended.output
    assert "Restored all states from the checkpoint" in ended.output
    # Nothing of the first three epochs of 4 steps is trained again.
    assert [int(n) for n in re.findall(r"epoch (\d)/5 done", ended.output)] == [1, 2, 3, 4, 5]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 20
    assert not ended.orphans


def _srun(cwd: Path, count: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """What ``srun --ntasks=COUNT`` does on one node: the same command as often, with SLURM's variables."""
    job = {
        "SLURM_JOB_ID": str(free_port()),  # Lightning's port comes from it
        "SLURM_JOB_NAME": "training",
        "SLURM_NTASKS": str(count),
        "SLURM_NTASKS_PER_NODE": str(count),
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    own = {**os.environ, **job, "PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "gradsync", *arguments],
            cwd=cwd,
            env={**own, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(count)
    ]


@pytest.mark.parametrize("strategy", ["ddp", "sharded_server"])
def test_slurm_signals_once_and_the_next_job_goes_on(strategy: str, tmp_path: Path) -> None:
    """As with ``#SBATCH --signal=USR1@120``, on a node without ``scontrol``."""
    fit = [*tiny_fit(strategy, 2), "--run_dir", "run", "--ckpt_path", "last", "--progress_every_n_steps", "5"]
    at = fit.index("--trainer.max_epochs") + 1
    tasks = _srun(tmp_path, 2, [*fit[:at], "1000000", *fit[at + 1 :]])
    assert tasks[0].stdout is not None
    lines = []
    for line in tasks[0].stdout:
        lines.append(line)
        if "epoch 2/" in line:
            break
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    output = "".join([*lines, *(task.communicate(timeout=240)[0] for task in tasks)])
    assert [task.returncode for task in tasks] == [138, 138], output
    assert "is not requeued: there is no scontrol on this node" in output
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    steps = [*fit, "--trainer.max_steps", str(saved["global_step"] + 2)]
    steps[steps.index("--trainer.max_epochs") + 1] = "-1"
    tasks = _srun(tmp_path, 2, steps)
    output = "".join(task.communicate(timeout=240)[0] for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], output
    resumed = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == saved["global_step"] + 2
