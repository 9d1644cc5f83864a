"""The script of the fault table: makes real trials, finds what should be, and notices what should not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
MARKS = ("<!-- faults table: benchmarks/faults.py writes it -->", "<!-- end of faults table -->")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "faults.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_kill_and_a_signal_hold_their_bounds(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(MARKS))
    files = ["--json", str(tmp_path / "f.json"), "--markdown", str(page), "--logs", str(tmp_path / "logs")]
    done = _run("--rows", "R1,R8", "--trials", "1", "--columns", "ours", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    trials = {name: rows[name]["ours"]["trials"] for name in ("R1", "R8")}
    assert [trial["case"] for trial in trials["R1"]] == ["rank 1", "rank 0"]
    assert [trial["case"] for trial in trials["R8"]] == ["SIGTERM to command"]
    for trial in [*trials["R1"], *trials["R8"]]:
        assert trial["misses"] == []
        assert trial["facts"]["orphans"] == 0
        assert trial["load_average"] >= 0
    assert all(trial["facts"]["names the dead rank"] for trial in trials["R1"])
    assert trials["R8"][0]["facts"]["checkpoint at a common step"]
    assert "| R8 | SIGTERM or Ctrl-C" in page.read_text()
    assert "s left" in done.stdout


def test_what_plain_ddp_misses_is_found(tmp_path: Path) -> None:
    """A check that could not fail would find nothing here, either."""
    files = ["--json", str(tmp_path / "f.json"), "--logs", str(tmp_path / "logs")]
    done = _run("--rows", "R1,R12", "--columns", "ddp", *files)
    assert done.returncode == 0, done.stdout + done.stderr  # only ours counts
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert any("names the dead rank" in miss for t in rows["R1"]["ddp"]["trials"] for miss in t["misses"])
    assert any("finite" in miss for t in rows["R12"]["ddp"]["trials"] for miss in t["misses"])
    logs = list((tmp_path / "logs").iterdir())
    assert logs
    assert all(str(log) in done.stdout for log in logs)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--rows R1,R99", "argument --rows: must be some of R1,R2"),
        ("--columns theirs", "must be some of ours,server,ddp"),
    ],
)
def test_mistakes_are_named(arguments: str, text: str) -> None:
    done = _run(*arguments.split())
    assert done.returncode == 2
    assert text in done.stderr


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fault_findings

    return fault_findings


def test_trials_become_a_cell(findings: Any) -> None:
    trials = [findings.Findings() for _ in range(3)]
    for number, found in enumerate(trials):
        found.should("named", number > 0)
        found.saw("all out, s", 1.5 + number)
        found.at_most("orphans", 0, 0)
        found.should("ended by itself", True)
    assert findings.cell(trials) == "named: 2 of 3; all out: 2.5 (1.5 to 3.5) s"
    trials[0].at_most("orphans", 2, 0)
    assert findings.cell(trials[:1]) == "named: no; all out: 1.5 s; orphans: 2"
    assert trials[0].misses.pop() == "orphans: 2, should be at most 0"
    assert [found.misses for found in trials] == [["not so: named"], [], []]


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("worker 1 was killed by SIGKILL", True),
        ("communication timed out: rank(s) 1 did not take part", True),
        ("[rank: 0] Child process with PID 7 terminated with code -9", False),
        ("rank 0 was killed by SIGKILL", False),
        ("Connection closed by peer [127.0.0.1]:1", False),
    ],
)
def test_a_rank_is_named_only_by_its_number(output: str, named: bool, findings: Any) -> None:
    import fault_trials

    assert fault_trials.names_rank(output, 1) is named


def test_a_foreign_process_is_left_alone_and_a_left_one_is_counted(findings: Any, tmp_path: Path) -> None:
    from fault_process import Run

    code = "import subprocess; subprocess.Popen(['sleep', '60'])"
    with (
        subprocess.Popen(["sleep", "60"]) as foreign,
        Run([sys.executable, "-c", code], tmp_path / "work", tmp_path / "t", tmp_path / "log") as run,
    ):
        run._leader.wait(60)
        ending = run.end(limit_s=1.0)
        assert ending.orphans == 1
        assert ending.hung
        assert ending.code == 0
        assert run.leftovers() == dict.fromkeys(run.leftovers(), 0)
        assert foreign.poll() is None
        foreign.kill()
