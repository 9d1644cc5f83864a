"""Run the installed command as a user would, and see what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from preloaded import Preloaded, Started

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))
from busy import Busy  # noqa: E402 (the same measure as theirs)

_MARK = "GRADSYNC_TEST_RUN"
OURS = (sys.executable, "-m", "gradsync")


@dataclass(frozen=True)
class Ended:
    """A command that has ended (or was killed at the limit: code None)."""

    code: int | None
    output: str
    orphans: list[str]
    seconds: float
    at: float
    """When it had ended, of ``time.monotonic``."""
    busy: Busy

    def within(self, seconds: float, since: float) -> bool:
        """Whether that was in time, three times as late on a busy machine; ``since`` it was to end."""
        return self.at - since < self.busy.bound_s(seconds, since)


def _marked(mark: str, session: int) -> dict[int, str]:
    """Command lines of the processes that carry ``mark`` in their environment, or are in this session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            is_marked = f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if is_marked or (of_session == str(session) and state not in "ZX"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ProcessLookupError):
            continue  # ended meanwhile, or not ours
    return found


def local_rank_of(pid: int) -> str | None:
    """By the name of a process that was forked from a run's template, or the environment that a launcher gave it."""
    with suppress(OSError):  # ended meanwhile
        kind, _, name = Path(f"/proc/{pid}/comm").read_text().strip().partition(":")
        if kind == "gradsync":
            return name
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return next((line.partition("=")[2] for line in environment if line.startswith("LOCAL_RANK=")), None)
    return None


def _send(number: signal.Signals, target: str, leader: int, mark: str) -> None:
    if target == "group":
        os.killpg(leader, number)
        return
    processes = {"launcher": leader}
    for pid in _marked(mark, leader):
        with suppress(OSError):  # ended meanwhile
            if (rank := local_rank_of(pid)) is not None:
                processes[rank] = pid
            elif Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(leader):
                processes["0"] = pid  # forked by the supervisor, which does not know of ranks
    os.kill(processes[target], number)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_preloaded: Preloaded | None = None


@contextmanager
def preloaded() -> Iterator[None]:
    """Within, commands of ours are forked from a process that has loaded what they need."""
    global _preloaded
    _preloaded = Preloaded()
    yield
    _preloaded.close()
    _preloaded = None


def _start(command: list[str], cwd: Path, env: dict[str, str], output: int) -> Started | subprocess.Popen[bytes]:
    is_ours = command[:3] == [*OURS] or command[:2] == [sys.executable, "-c"]
    if is_ours and _preloaded is not None and _preloaded.knows(env):
        return _preloaded.start(command[1:], cwd, env, output)
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=output,
        stderr=output,
        start_new_session=True,
        # A suite that a shell runs in the background ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_command(
    command: list[str],
    cwd: Path,
    timeout_s: float = 240,
    orphan_grace_s: float = 3.0,
    interrupt_at: str | None = None,
    signal_at: tuple[str, signal.Signals, str] | None = None,
) -> Ended:
    """Run to the end, stdout and stderr together; orphans are what still lives ``orphan_grace_s`` later.

    The limit is below that of a step, 300 s: whoever waits for a step in vain is killed.

    ``interrupt_at``: press Ctrl-C, as in a terminal, when this text appears. ``signal_at``: at a text, send a signal to
    all (``"group"``), to the started process
    (``"launcher"``) or to the one with this ``LOCAL_RANK``.
    """
    mark = uuid.uuid4().hex
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env = {**inherited, _MARK: mark, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env["PYTHONUNBUFFERED"] = "1"
    start = time.monotonic()
    reader, writer = os.pipe()
    process = _start(command, cwd, env, writer)
    os.close(writer)
    busy, late = Busy(), threading.Event()

    def stop() -> None:
        late.set()
        _kill(_marked(mark, process.pid))

    limit = threading.Timer(timeout_s, stop)
    limit.start()
    lines = []
    with os.fdopen(reader, errors="replace") as output:
        for line in output:
            lines.append(line)
            if interrupt_at is not None and interrupt_at in line:
                os.killpg(process.pid, signal.SIGINT)
                interrupt_at = None
            if signal_at is not None and signal_at[0] in line:
                _send(signal_at[1], signal_at[2], process.pid, mark)
                signal_at = None
    code = process.wait()
    limit.cancel()
    at = time.monotonic()
    while (orphans := _marked(mark, process.pid)) and time.monotonic() < at + busy.bound_s(orphan_grace_s, at):
        time.sleep(0.1)
    busy.stop()
    _kill(orphans)
    return Ended(None if late.is_set() else code, "".join(lines), list(orphans.values()), at - start, at, busy)


def gradsync(*arguments: str, cwd: Path, timeout_s: float = 240, interrupt_at: str | None = None) -> Ended:
    """``gradsync ARGUMENTS`` in ``cwd``."""
    return run_command([*OURS, *arguments], cwd, timeout_s, interrupt_at=interrupt_at)


def tiny_fit(strategy: str, devices: int, **faults: object) -> list[str]:
    """Arguments of a short fit of an MLP, with a fault if asked for."""
    model = [part for name, value in faults.items() for part in (f"--model.{name}", str(value))]
    return [
        "fit", "--trainer.strategy", strategy, "--trainer.accelerator", "cpu", "--trainer.devices", str(devices),
        "--trainer.max_epochs", "1", "--model", "faulty.FaultyMlp", *model, "--data", "faulty.TinyData",
    ]  # fmt: skip
