"""Whoever else ends, the process that the user started lives to tell, and leaves nothing of the run behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import gradsync, run_command, tiny_fit

from gradsync.processes import remove_stale_folders

TESTS = Path(__file__).parent


def _fit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gradsync", *arguments]


def test_the_run_may_use_cuda(tmp_path: Path) -> None:
    """CUDA refuses processes forked from one that has asked for its devices."""
    code = """
import gradsync.cli, torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0
from gradsync.supervisor import go_on_supervised
go_on_supervised()
print(asked, torch.cuda._is_in_bad_fork())
"""
    assert run_command([sys.executable, "-c", code], tmp_path).output == "[] False\n"


def test_a_killed_supervisor_takes_the_run_with_it(tmp_path: Path) -> None:
    arguments = tiny_fit("manual_allreduce", 2)
    arguments[arguments.index("--trainer.max_epochs") + 1] = "1000000"
    command = _fit(*arguments, "--progress_every_n_steps", "5")
    ended = run_command(command, tmp_path, signal_at=("epoch 2/", signal.SIGKILL, "launcher"))
    assert ended.code == -signal.SIGKILL
    assert not ended.orphans


def test_what_a_run_leaves_running_is_ended(tmp_path: Path) -> None:
    ended = gradsync(*tiny_fit("ddp", 2, fault="leave_process", process=1, at_step=1), cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert not ended.orphans


def test_a_process_that_dies_before_the_run_begins_is_named(tmp_path: Path) -> None:
    """Under Lightning's own launcher the others would wait for it until their limit, 30 minutes."""
    (tmp_path / "dying.py").write_text(
        "import os\n"
        "from faulty import FaultyMlp, TinyData\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    arguments = tiny_fit("ddp", 2)
    arguments[arguments.index("--model") + 1] = "dying.FaultyMlp"
    ended = gradsync(*arguments, cwd=tmp_path)
    assert ended.code == 1, ended.output
    assert "gradsync: error: process 1 was killed by SIGKILL" in ended.output
    assert not ended.orphans


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number: signal.Signals, tmp_path: Path) -> None:
    """As under ``nohup``, or in the background of a shell."""
    code = f"""
import os, signal, sys
signal.signal({number}, signal.SIG_IGN)
from gradsync.supervisor import go_on_supervised
go_on_supervised()
os.kill(os.getppid(), {number})
import time; time.sleep(0.5)
sys.exit(7)
"""
    assert run_command([sys.executable, "-c", code], tmp_path).code == 7


def test_signals_to_the_supervisor_reach_the_run_and_its_code_the_user(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from gradsync.supervisor import go_on_supervised
go_on_supervised()
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(30)
"""
    assert run_command([sys.executable, "-c", code], tmp_path).code == 9


def test_a_stopped_process_is_ended_too(tmp_path: Path) -> None:
    """SIGTERM has no effect on it."""
    code = """
import os, signal, subprocess
from gradsync.supervisor import go_on_supervised
go_on_supervised()
child = subprocess.Popen(["sleep", "1000"])
child.send_signal(signal.SIGSTOP)
"""
    ended = run_command([sys.executable, "-c", code], tmp_path)
    assert ended.code == 0
    assert not ended.orphans


def test_dead_sockets_of_multiprocessing_go_and_living_ones_stay() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # the paths of sockets are short
        folder = Path(name)
        for kind in ("dead", "living"):
            (folder / f"pymp-{kind}").mkdir()
        with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as living:
            dead.bind(str(folder / "pymp-dead" / "listener"))
            living.bind(str(folder / "pymp-living" / "listener"))
            living.listen()
            dead.close()
            remove_stale_folders(folder)
        assert [path.name for path in folder.iterdir()] == ["pymp-living"]


def test_a_comparison_that_is_killed_leaves_no_run(tmp_path: Path) -> None:
    command = _fit("compare", "--demo", "--strategies", "manual_allreduce", "--epochs", "100", "--output", "out")
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(_of_run(tmp_path)) < 4 and time.monotonic() < deadline:  # supervisor, template and two ranks
        time.sleep(0.1)
    assert len(_of_run(tmp_path)) >= 4
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120  # one that is still loading ends when it has
    while _of_run(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _of_run(tmp_path)


def _of_run(folder: Path) -> list[int]:
    """Processes of a fit in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(process / "cwd") == str(folder)
            if here and b"fit" in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found
