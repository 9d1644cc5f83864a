"""The table of a comparison fills from the lines that its runs print, and has room on every terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from gradsync.comparison_table import ComparisonTable

STEP = "epoch 2 step 25/50 loss 1.75 | 210 img/s | step 80 ms = data 4 + compute 53 + exposed comm 20 + optimizer 3"
DONE = "epoch 2/2 done | train loss 1.5, top-1 40.0 % | val loss 1.25, top-1 55.5 %, top-5 90.0 % | 220 img/s | 9.0 s"


def _table() -> ComparisonTable:
    table = ComparisonTable([("ddp", 2), ("parameter_server_servers=2+transport=tcp", 2), ("sharded_server", 2)])
    table.start(0)
    for line in (STEP, DONE):
        table.read(0, line)
    table.end(0, failed=False)
    table.start(1)
    table.read(1, STEP)
    table.read(1, "a line of something else, epoch 9 step 1/1")
    return table


def _shown(table: ComparisonTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return re.sub(r"\x1b\[[\d;]*m", "", captured.get())


def test_figures_come_from_the_lines() -> None:
    done, running, waiting = _table().runs
    assert (done.state, done.images_per_s, done.share, done.loss, done.top1) == ("done", "220", "25", "1.5", "55.5")
    assert (running.state, running.images_per_s, running.part_done) == ("running", "210", 0.75)
    assert (waiting.state, waiting.images_per_s) == ("waiting", "")


def test_time_left_is_that_of_the_whole_comparison() -> None:
    table = _table()
    assert table.part_done == pytest.approx(1.75 / 3)
    assert table.left().endswith("left")
    table.end(1, failed=True)
    table.end(2, failed=False)
    assert table.left() == ""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    shown = "\n".join(line.rstrip() for line in _shown(_table(), width).splitlines())
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    for part in ("time\n", " 0 s\n", "done", "epoch 2/2  75%", "waiting", "220", "25 %", "55.5 %", "1 of 3 runs, 58%"):
        assert part in shown, (part, shown)


def _in_a_terminal(command: list[str], cwd: Path, columns: int) -> tuple[int, str]:
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=cwd, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                parts.append(os.read(leader, 65536))
            except OSError:  # the other side has closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(200)
    reader.join()
    os.close(leader)
    return code, b"".join(parts).decode()


def test_a_comparison_in_a_terminal_shows_the_table_filling(tmp_path: Path) -> None:
    tiny = ["--model.arch", "shufflenet_v2_x0_5", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "1"]
    options = ["--strategies", "ddp,sharded_server", "--epochs", "1", "--batch-size", "8", "--output", "out"]
    command = [sys.executable, "-m", "gradsync", "compare", *options, "--", *tiny]
    code, shown = _in_a_terminal([*command, "--progress_every_n_steps", "1"], tmp_path, 100)
    assert code == 0, shown
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "waiting" in shown
    assert re.search(r"ddp +.*epoch 1/1 +\d+%", shown), shown
    assert "2 of 2 runs, 100%" in shown
    assert "[ddp]" not in shown, "lines are for where there is no terminal"
