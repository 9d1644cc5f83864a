"""One batch size: a short fit in processes of its own, its memory watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from .fit_process import error_in, running_fit

Outcome = Literal["fits", "too large", "more than the data", "failed"]

GIB = 2**30
_WATCH_EVERY_S = 0.2
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc|MemoryError", re.IGNORECASE)
_MOST_OF_THE_DATA = re.compile(r"--data\.batch_size must be <= (\d+)")
# What processes say when another one has gone, without a word of its own: the kernel kills so for memory.
_KILLED = re.compile(r"was killed|has gone|Connection (closed|reset)|SIGKILL", re.IGNORECASE)


@final
@dataclass(frozen=True)
class Trial:
    """What became of one batch size.

    Attributes:
        images_per_s: Of all training processes together, warm-up left out; None if it did not fit.
        peak_gib: Most memory of all its processes together (proportional set size: shared pages count once).
        peak_gpu_gib: Most that tensors took on the first process's GPU, where there is one.
        detail: Why it did not fit, or its error.
        largest: With ``more than the data``: the largest size that the data allow.
    """

    batch_size: int
    outcome: Outcome
    images_per_s: float | None
    peak_gib: float
    peak_gpu_gib: float | None
    seconds: float
    detail: str = ""
    largest: int | None = None


def run_trial(batch_size: int, arguments: list[str], folder: Path, limit_bytes: float) -> Trial:
    """Run ``gradsync fit`` with the batch size; block until all its processes have ended.

    Args:
        arguments: Of ``gradsync fit``.
        folder: Of its log, result and TensorBoard run.
        limit_bytes: A trial that takes more memory is ended.
    """
    results = folder / f"results_{batch_size}.json"
    own = [
        "--data.batch_size",
        str(batch_size),
        "--run_dir",
        str(folder / f"run_{batch_size}"),
        "--results",
        str(results),
    ]
    results.unlink(missing_ok=True)
    log = folder / f"{batch_size}.log"
    start = time.monotonic()
    with log.open("w") as output, running_fit(["fit", *arguments, *own], output) as process:
        memory = _MemoryWatch(process.pid, limit_bytes)
        try:
            code = process.wait()
        finally:
            memory.stop()
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    return _judge(batch_size, code, lines, results, memory, seconds)


def _judge(batch_size: int, code: int, lines: list[str], results: Path, memory: _MemoryWatch, seconds: float) -> Trial:
    def trial(outcome: Outcome, detail: str = "", largest: int | None = None) -> Trial:
        return Trial(batch_size, outcome, None, memory.peak_bytes / GIB, None, seconds, detail, largest)

    if memory.is_over:
        return trial("too large", f"beyond the limit of {memory.limit_bytes / GIB:.2f} GiB")
    if code == 0:
        result = json.loads(results.read_text())
        gpu = result.get("peak_gpu_bytes")
        speed = result["summary"]["avg_train_throughput"]
        return Trial(batch_size, "fits", speed, memory.peak_bytes / GIB, gpu and gpu / GIB, seconds)
    error = error_in(lines) or f"exit code {code}, see the log"
    if found := _MOST_OF_THE_DATA.search(error):
        return trial("more than the data", error, int(found.group(1)))
    reason = why_too_large(code, lines)
    return trial("too large", reason) if reason else trial("failed", error.removeprefix("error: "))


def why_too_large(code: int, lines: list[str]) -> str | None:
    """Why a fit that ended with this code and these lines has failed for memory; None if for something else."""
    said = [line.removeprefix("gradsync: ") for line in lines if line.startswith("gradsync: ")]
    if any(_OUT_OF_MEMORY.search(line) for line in [*said, *lines[-5:]]):
        return "out of memory"
    own = [line for line in said if line.startswith("error: ") and not _KILLED.search(line)]
    first = [line for line in said if "failed first" in line and not _KILLED.search(line)]
    if own or first:
        return None
    killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL) or any(_KILLED.search(line) for line in said)
    return "killed, as the kernel does where memory is short" if killed else None


@final
class _MemoryWatch:
    """A thread that adds up what the processes of a session take, and kills them all beyond the limit."""

    def __init__(self, session: int, limit_bytes: float) -> None:
        self.peak_bytes = 0
        self.limit_bytes = limit_bytes
        self.is_over = False
        self._session = session
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_EVERY_S):
            members = processes_of(self._session)
            self.peak_bytes = max(self.peak_bytes, sum(map(resident_bytes, members)))
            if self.peak_bytes > self.limit_bytes:
                self.is_over = True
                for pid in members:
                    _kill(pid)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def processes_of(session: int) -> list[int]:
    """Living processes of a session, whatever process groups they are in."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def resident_bytes(pid: int) -> int:
    """Proportional set size: a page that n processes share counts as 1/n. 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
