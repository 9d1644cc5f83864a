"""Processes forked from a template are children like others, and begin as new ones do."""

from __future__ import annotations

import sys
from pathlib import Path

from commands import Ended, gradsync, run_command, tiny_fit

START = """
import os, random, signal, sys, time
import numpy, torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from gradsync.supervisor import go_on_supervised
from gradsync.template import drop_template, keep_template, start_process
go_on_supervised()
keep_template()
rank = os.environ.get("LOCAL_RANK")
"""


def _run(code: str, folder: Path) -> Ended:
    ended = run_command([sys.executable, "-c", START + code], folder)
    assert not ended.orphans
    return ended


def test_they_begin_with_their_own_environment_and_are_children_of_the_first(tmp_path: Path) -> None:
    code = """
if rank is not None:
    parent = os.getppid() == int(os.environ["FIRST"])
    print(rank, parent, "GONE" in os.environ, rank_zero_only.rank, open("/proc/self/comm").read(), end="")
    sys.exit()
os.environ["GONE"] = "1"
env = {k: v for k, v in os.environ.items() if k != "GONE"} | {"FIRST": str(os.getpid())}
for number in ("1", "2"):
    process = start_process([], {**env, "LOCAL_RANK": number})
    print("code", process.wait(), process.poll(), flush=True)
print(rank_zero_only.rank)
"""
    ended = _run(code, tmp_path)
    assert ended.output == "1 True False 1 gradsync:1\ncode 0 0\n2 True False 2 gradsync:2\ncode 0 0\n0\n"


def test_they_draw_random_numbers_of_their_own_until_they_are_seeded(tmp_path: Path) -> None:
    code = """
if rank is not None:
    print(random.random(), numpy.random.random(), os.urandom(4))
    sys.exit()
for number in ("1", "2"):
    start_process([], {**os.environ, "LOCAL_RANK": number}).wait()
"""
    first, second = (line.split() for line in _run(code, tmp_path).output.splitlines())
    assert not set(first) & set(second)


def test_signals_to_the_group_leave_the_template_and_reach_those_it_starts(tmp_path: Path) -> None:
    code = """
if rank is not None:
    print("started", signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
    os.mkdir("started")
    time.sleep(60)
signal.signal(signal.SIGTERM, lambda *_: None)
os.killpg(0, signal.SIGTERM)
process = start_process([], {**os.environ, "LOCAL_RANK": "1"})
while not os.path.exists("started"):
    time.sleep(0.01)
process.terminate()
print(process.wait())
"""
    assert _run(code, tmp_path).output == f"started True\n{-15}\n"


def test_without_it_the_error_says_so(tmp_path: Path) -> None:
    code = """
[template] = map(int, open(f"/proc/self/task/{os.getpid()}/children").read().split())
os.kill(template, signal.SIGKILL)
os.waitpid(template, 0)
try:
    start_process([], {**os.environ, "LOCAL_RANK": "1"})
except Exception as error:
    print(type(error).__name__, error)
"""
    assert _run(code, tmp_path).output == (
        "UserError a process of this run cannot be started: its template has ended\n"
    )


def test_it_ends_when_it_is_dropped_and_with_the_first(tmp_path: Path) -> None:
    code = """
drop_template()
os.waitpid(-1, 0)
drop_template()
keep_template()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert _run(code, tmp_path).code == 128 + 9


def test_a_fit_loads_torch_once(tmp_path: Path) -> None:
    (tmp_path / "loading.py").write_text(
        "import os, torch\n"
        "from faulty import FaultyMlp\n"
        "class Mlp(FaultyMlp):\n"
        "    def on_train_start(self):\n"
        "        print(f'rank {self.global_rank} parent', os.getppid(), 'torch', id(torch), flush=True)\n"
    )
    for strategy, processes in (("ddp", 2), ("manual_allreduce", 2), ("parameter_server", 3)):
        arguments = tiny_fit(strategy, processes)
        arguments[arguments.index("--model") + 1] = "loading.Mlp"
        ended = gradsync(*arguments, cwd=tmp_path)
        assert ended.code == 0, ended.output
        places = [line.split("torch ")[1] for line in ended.output.splitlines() if line.startswith("rank ")]
        assert len(places) == 2
        assert len(set(places)) == 1, "one of them has loaded it anew"
