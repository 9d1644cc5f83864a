"""Trials of `faults.py` about checkpoints: in a kill, on a full disk, damaged."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from fault_columns import CHECKPOINTS, Job
from fault_findings import Bench, Findings, NotRun, Row

_BROKEN = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError)
_LARGE = 500_000
"""Parameters, so that the middle of a checkpoint is weights and a save takes a while: 4 MB with the momentum."""


def loads(path: Path) -> bool:
    """Whether torch reads it."""
    try:
        torch.load(path, weights_only=True)
    except _BROKEN:
        return False
    return True


# -- a kill during a save ------------------------------------------------------------------------------------


@final
class KilledWhileSaving:
    """R9: every run goes on from what the one killed before it has left, and saves without end."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}
        self._random = random.Random(0)

    def __call__(self, bench: Bench, case: str) -> Findings:
        found, first = Findings(), bench.column.first_process
        job = Job(num_epochs=None, steps_per_epoch=1, num_more=_LARGE, resume=True)
        if bench.column.name not in self._folders:
            self._folders[bench.column.name] = bench.new_folder()
        folder = self._folders[bench.column.name]
        (folder / f"steps.{first}").unlink(missing_ok=True)
        before = self._leftovers(bench, folder)
        with bench.run(job, folder, keeps_temporary=True) as run:
            run.reach(lambda: len(run.steps(first)) > 3, "its first saves")
            found.at_most("leftovers after the next start", len(before & self._leftovers(bench, folder)), 0)
            time.sleep(self._random.uniform(0, 0.3))
            run.kill()
            self._look(found, folder / CHECKPOINTS)
        return found

    @staticmethod
    def _leftovers(bench: Bench, folder: Path) -> set[Path]:
        """Files that are no checkpoint, nor its manifest; and whatever is among the temporary files."""
        beside = {path for path in (folder / CHECKPOINTS).glob("*") if path.suffix not in (".ckpt", ".sha256")}
        return beside | set(bench.temporary(folder).glob("*"))

    @staticmethod
    def _look(found: Findings, checkpoints: Path) -> None:
        files = sorted(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        broken = [path for path in files if not loads(path)]
        found.should("newest checkpoint loads", bool(files) and files[-1] not in broken)
        found.at_most("unreadable files under a checkpoint's name", len(broken), 0)
        if broken:  # or the next run could not go on
            shutil.rmtree(checkpoints)


# -- disks ---------------------------------------------------------------------------------------------------


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small disk. Raises: NotRun for whoever may not mount one."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        raise NotRun("needs root, for a small disk of its own")
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise NotRun("needs a machine where root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disk(bench: Bench, case: str) -> Findings:
    """R10: a disk with room for two of three checkpoints; one that can only be read."""
    found, folder = Findings(case), bench.new_folder()
    full = case == "full"
    job = Job(num_epochs=4, steps_per_epoch=5, num_more=60_000)  # 480 kB a checkpoint
    with _mounted(folder / CHECKPOINTS, "size=1200k" if full else "ro"), bench.run(job, folder) as run:
        ending = run.end(limit_s=120)
        found.ended(ending, fails=not full)
        steps = len(run.steps(bench.column.first_process))
        if full:
            files = list((folder / CHECKPOINTS).glob("*.ckpt"))
            found.should("training goes on", steps == 20)
            found.should("an earlier checkpoint loads", any(map(loads, files)))
            found.should("no unreadable file under a checkpoint's name", all(map(loads, files)))
        else:
            found.should("found before the first step", steps == 0)
        found.left_nothing(run)
    return found


# -- damage --------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def damaged(bench: Bench, case: str) -> Findings:
    """R11."""
    found, folder = Findings(case), bench.new_folder()
    job = Job(num_epochs=3, steps_per_epoch=5, num_more=_LARGE)
    with bench.run(job, folder) as run:
        if run.end(limit_s=120).code:
            raise NotRun("the run whose checkpoint was to be damaged has failed")
    {"flipped": _flip, "cut": _cut}[case](folder / CHECKPOINTS / "last.ckpt")
    steps = folder / f"steps.{bench.column.first_process}"
    steps.unlink()
    before = len(bench.log.read_text())
    with bench.run(Job(num_epochs=4, steps_per_epoch=5, num_more=_LARGE, resume=True), folder) as run:
        ending = run.end(limit_s=120)
        output = run.output[before:]
        found.ended(ending, fails=False)
        says = bool(re.search(r"last\.ckpt[^\n]*(damaged|corrupt|invalid|broken)", output))
        found.should("refused", says or ending.code != 0)
        found.should("by name", says)
        trained = steps.exists() and bool(run.steps(bench.column.first_process))
        found.should("goes on from an earlier one", says and trained)
        found.left_nothing(run)
    return found


CHECKPOINT_ROWS = {
    "R9": Row("SIGKILL of all during a save, $TMPDIR on another disk", ("",), KilledWhileSaving()),
    "R10": Row("disk full; read-only folder", ("full", "read-only"), disk),
    "R11": Row("checkpoint with a flipped bit; cut short", ("flipped", "cut"), damaged),
}
