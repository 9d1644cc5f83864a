"""A run that fails in any process ends in all of them, shows the true error, and leaves no orphan."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Ended, gradsync, run_command, tiny_fit
from faulty import KILLED_AT

RUNS = {"ddp": 2, "manual_allreduce": 2, "parameter_server": 3, "sharded_server": 2}


@pytest.mark.parametrize(
    ("strategy", "process"),
    [("ddp", 0), ("ddp", 1), ("manual_allreduce", 1), ("parameter_server", 2), ("sharded_server", 0)],
)
def test_an_exception_in_one_process_ends_all(strategy: str, process: int, tmp_path: Path) -> None:
    ended = gradsync(*tiny_fit(strategy, RUNS[strategy], fault="raise", process=process), cwd=tmp_path)
    assert ended.code not in (0, None), ended.output
    # Once: nobody repeats it, and nobody adds what it meant for him.
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    assert said == ["gradsync: error: ArithmeticError: boom in training"]
    assert ended.output.count("Traceback (most recent call last)") == 1, ended.output
    assert not ended.orphans


@pytest.mark.parametrize(
    ("strategy", "process"),
    [
        *(("ddp", 0), ("ddp", 1), ("manual_allreduce", 0), ("manual_allreduce", 1), ("sharded_server", 1)),
        ("parameter_server", 2),
    ],
)
def test_a_killed_process_is_named_and_ends_all(strategy: str, process: int, tmp_path: Path) -> None:
    ended = gradsync(*tiny_fit(strategy, RUNS[strategy], fault="kill", process=process, at_step=2), cwd=tmp_path)
    assert ended.within(3.0, since=_killed_at(ended))
    assert ended.code == (137 if process == 0 else 1), ended.output
    name = f"process {process}" if strategy != "parameter_server" else "worker 1"
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    assert said == [f"gradsync: error: {name} was killed by SIGKILL (the kernel does so where memory is short)"]
    assert not ended.orphans


def test_out_of_memory_names_the_batch_size_flag(tmp_path: Path) -> None:
    ended = gradsync(*tiny_fit("manual_allreduce", 1, fault="memory", process=0), cwd=tmp_path)
    assert ended.code == 1
    assert "out of memory: lower --data.batch_size" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    "strategy", ["manual_allreduce", "parameter_server", "parameter_server collective", "sharded_server"]
)
def test_a_silent_process_is_named_with_the_flag_that_raises_the_limit(strategy: str, tmp_path: Path) -> None:
    strategy, _, transport = strategy.partition(" ")
    arguments = [*tiny_fit(strategy, RUNS[strategy], fault="stop", process=RUNS[strategy] - 1)]
    arguments += ["--trainer.strategy.transport", transport] if transport else []
    ended = gradsync(*arguments, "--trainer.strategy.step_timeout_s", "6", cwd=tmp_path)
    assert ended.code not in (0, None), ended.output
    assert "--trainer.strategy.step_timeout_s" in ended.output
    assert "worker(s) 1" in ended.output or "rank(s) 1 did not take part" in ended.output
    if strategy == "manual_allreduce":
        assert "this one waits in step 3, bucket 1 of 1" in ended.output
    assert not ended.orphans


@pytest.mark.parametrize(
    ("options", "process", "named"),
    [
        (["mode=async"], 2, "worker 1 was killed by SIGKILL"),
        (["mode=bounded", "transport=tcp"], 1, "worker 0 was killed by SIGKILL"),
        (["servers=2"], 3, "worker 1 was killed by SIGKILL"),
        (["transport=collective"], 2, "worker 1 was killed by SIGKILL"),
    ],
)
def test_a_killed_worker_is_named_in_every_mode(options: list[str], process: int, named: str, tmp_path: Path) -> None:
    arguments = tiny_fit("parameter_server", 4, fault="kill", process=process, at_step=1)
    ended = gradsync(*arguments, *(f"--trainer.strategy.{option}" for option in options), cwd=tmp_path)
    assert ended.code not in (0, None), ended.output
    assert named in ended.output
    assert not ended.orphans


def _killed_at(ended: Ended) -> float:
    at = next((line for line in ended.output.splitlines() if KILLED_AT in line), None)
    assert at is not None, ended.output
    return float(at.partition(KILLED_AT)[2])


@pytest.mark.parametrize("process", [1, 3])
def test_a_worker_killed_within_a_collective_is_named_at_once(process: int, tmp_path: Path) -> None:
    arguments = tiny_fit("parameter_server", 4, fault="kill_in_exchange", process=process, at_step=1)
    ended = gradsync(*arguments, "--trainer.strategy.transport", "collective", cwd=tmp_path)
    assert ended.code not in (0, None), ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    name = f"worker {process - 1}"
    assert said == [f"gradsync: error: {name} was killed by SIGKILL (the kernel does so where memory is short)"]
    assert ended.within(6.0, since=_killed_at(ended))  # the group's own limit is step_timeout_s, 300
    assert not ended.orphans


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run's own temporary folder, short enough for Unix sockets: other runs on the machine have theirs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


_KILLED_SERVERS = [
    ([], 0),
    (["mode=async", "transport=ipc"], 0),
    (["servers=2", "transport=tcp"], 1),
    (["servers=2", "mode=bounded"], 0),
]


@pytest.mark.parametrize(("options", "server"), _KILLED_SERVERS)
def test_a_killed_server_is_named_and_ends_all(
    options: list[str], server: int, tmp_path: Path, temporary: Path
) -> None:
    faults = {"fault": "kill_server", "process": 3, "at_step": 1, "server": server}
    arguments = tiny_fit("parameter_server", 4, **faults)
    ended = gradsync(*arguments, *(f"--trainer.strategy.{option}" for option in options), cwd=tmp_path)
    assert ended.within(6.0, since=_killed_at(ended))
    assert ended.code not in (0, None), ended.output
    assert ended.output.count(f"server {server} was killed") == 1, ended.output
    assert not ended.orphans
    assert not list(temporary.glob("gradsync-*"))


def test_a_killed_server_ends_all_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    fit = tiny_fit("parameter_server", 3, fault="kill_server", process=2, at_step=1, server=0)
    at = fit.index("--trainer.devices")
    del fit[at : at + 2]
    ended = run_command([*torchrun, "-m", "gradsync", *fit], tmp_path)
    assert ended.within(6.0, since=_killed_at(ended)), ended.output
    assert ended.code not in (0, None), ended.output
    assert not ended.orphans


def test_a_run_goes_on_without_a_killed_worker(tmp_path: Path) -> None:
    arguments = tiny_fit("parameter_server", 4, fault="kill", process=3, at_step=1)
    ended = gradsync(*arguments, "--trainer.strategy.on_worker_loss", "continue", cwd=tmp_path)
    assert ended.code == 0, ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    loss = "worker 2 was killed by SIGKILL, after 1 steps"
    assert said == [f"gradsync: warning: {loss}: the run goes on with 2 of 3 workers"]
    (path,) = tmp_path.glob("runs/**/results_*.json")
    result = json.loads(path.read_text())
    assert result["lost_workers"] == [
        {"worker": 2, "reason": "was killed by SIGKILL", "pushes": 1, "samples": result["batch_size"], "incarnation": 0}
    ]
    epochs = [epoch["samples_seen"] for epoch in result["epochs"]]
    assert epochs == [2 * 160 + result["batch_size"]]  # each worker has a third of 480 samples
    assert not ended.orphans


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    arguments = [part if part != "faulty.FaultyMlp" else "faulty.Returning" for part in tiny_fit("parameter_server", 4)]
    arguments += ["--trainer.max_epochs", "4000", "--trainer.strategy.on_worker_loss", "continue"]
    arguments += ["--trainer.strategy.max_replacements", "1", "--trainer.enable_progress_bar", "false"]
    ended = gradsync(*arguments, "--trainer.num_sanity_val_steps", "0", cwd=tmp_path)
    assert ended.code == 0, ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]
    assert said == [
        "gradsync: warning: worker 2 was killed by SIGKILL, after 1 steps: the run goes on with 2 of 3 workers, and a "
        "new process is started in its place",
        "gradsync: worker 2 is back, in another process: 3 of 3 workers",
    ]
    (path,) = tmp_path.glob("runs/**/results_*.json")
    seen = [epoch["samples_seen"] for epoch in json.loads(path.read_text())["epochs"]]
    assert 320 in seen[1:]  # two workers, each a third of the data
    assert seen[-1] == 480  # three again
    assert not ended.orphans
