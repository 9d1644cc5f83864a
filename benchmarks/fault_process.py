"""A command under observation: when all its processes are out, who outlives it, what it leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from busy import Busy
from fault_models import FAULT_AT

_MARK = "GRADSYNC_FAULT_TRIAL"
_START_LIMIT_S = 120.0
_POLL_S = 0.03
_GRACE_S = 1.0
"""Who lives for this long after the process that the user started is an orphan."""
_PR_SET_PDEATHSIG = 1
_LOGS_OF_TORCHRUN = "torchelastic_"
_LISTENS = "0A"
_HERE = str(Path(__file__).resolve().parent)
_LEAKED = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


class TrialFailed(Exception):
    """The trial itself has no result: the run did not get as far as the fault, for instance."""


@final
@dataclass(frozen=True)
class Step:
    """A step that a process has begun."""

    pid: int
    epoch: int
    number: int
    at: float


@final
@dataclass(frozen=True)
class Ending:
    """How a run ended, once something happened to it."""

    seconds: float
    """Until all were out, or until all were killed at the limit."""
    code: int
    hung: bool
    orphans: int
    orphans_s: float
    """How long they lived on."""
    was_busy: bool
    """The machine, with other things."""


@final
class Run:
    """Starts `command` in the folder `work`; as a context, it leaves no process behind.

    Args:
        temporary: Its folder for temporary files: short, and on another file system than `work` where there is one.
        log: Gets the output of all processes.
        environment: On top of this process's own.
    """

    def __init__(
        self, command: list[str], work: Path, temporary: Path, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        for folder in (work, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        self._mark = f"{_MARK}={uuid.uuid4().hex}".encode()
        self._log, self._temporary, self._work = log, temporary, work
        self._seen: set[int] = set()
        self._ports: set[str] = set()
        clean = {name: value for name, value in os.environ.items() if name not in _LEAKED}
        name, _, value = self._mark.decode().partition("=")
        own = {name: value, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        own |= {"PYTHONPATH": _HERE, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            self.started_at = time.monotonic()
            self._leader = subprocess.Popen(
                command, cwd=work, env=clean | own | (environment or {}), stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_as_in_a_terminal,
            )  # fmt: skip
        self._busy = Busy()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._busy.stop()
        self.kill()

    # -- what is going on ------------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Those of this run that live; zombies have no environment left."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        self._seen.update(found)
        return found

    def steps(self, local_rank: int) -> list[Step]:
        """That this process has begun, in all attempts."""
        path = self._work / f"steps.{local_rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [line.split() for line in lines]
        return [Step(int(pid), int(epoch), int(number), float(at)) for pid, epoch, number, at in rows]

    def reach(self, condition: Callable[[], Any], what: str, limit_s: float = _START_LIMIT_S) -> None:
        """Block until `condition`. Raises: TrialFailed if the run ends before, or takes longer."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self._leader.poll() is not None or time.monotonic() > deadline:
                if condition():  # it was so before the end
                    break
                raise TrialFailed(f"the run did not come to {what} (exit code {self._leader.poll()})")
            time.sleep(_POLL_S)
        self._ports |= _listening(self.processes())

    def fault_at(self) -> float:
        """Block until the run says that its fault is there, see :mod:`fault_models`; when that was."""
        self.reach(lambda: FAULT_AT in self.output, "its fault")
        return self._last_fault()

    def _last_fault(self) -> float:
        return max(float(text.split("\n", 1)[0]) for text in self.output.split(FAULT_AT)[1:])

    # -- what is done to it ----------------------------------------------------------------------------------

    def send(self, number: signal.Signals, target: str, first_process: int = 0) -> None:
        """To the process that was started (``command``), to all (``group``), or to one (``rank 1``)."""
        if target == "group":
            os.killpg(self._leader.pid, number)
        elif target == "command":
            os.kill(self._leader.pid, number)
        else:
            os.kill(self.steps(first_process + int(target.removeprefix("rank ")))[-1].pid, number)

    def kill(self) -> None:
        """All of it, at once; blocks until they are gone."""
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._leader.wait(10)

    def end(self, since: float | None = None, limit_s: float = 60.0) -> Ending:
        """Block until no process is left, or kill all `limit_s` seconds after the fault (which was at `since`)."""
        deadline = time.monotonic() + limit_s
        leader_out, orphans = None, 0
        while left := self.processes():
            now = time.monotonic()
            if leader_out is None and self._leader.poll() is not None:
                leader_out = now
            if leader_out is not None and now > leader_out + self._busy.bound_s(_GRACE_S, leader_out):
                orphans = max(orphans, len(left))
            if now > deadline:
                orphans = max(orphans, len(left)) if leader_out is not None else orphans
                self.kill()
                break
            time.sleep(_POLL_S)
        out = time.monotonic()
        since = since if since is not None else self._last_fault() if FAULT_AT in self.output else self.started_at
        lived_on = out - leader_out if orphans and leader_out is not None else 0.0
        return Ending(out - since, self._leader.wait(10), bool(left), orphans, lived_on, self._busy.since(since))

    # -- what is left ----------------------------------------------------------------------------------------

    def leftovers(self) -> dict[str, int]:
        """To be called when the run has ended: all should be 0. The kernel gets a second to close what is closed."""
        deadline = time.monotonic() + _GRACE_S
        while any((left := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return left

    def _left(self) -> dict[str, int]:
        files = [path for path in self._temporary.glob("*") if not path.name.startswith(_LOGS_OF_TORCHRUN)]
        names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        pids = {str(pid) for pid in self._seen}
        segments = [name for name in names if pids & set(re.split(r"[-_.]", name))]
        living = self.processes()
        return {
            "processes": len(living),
            "listeners": len((_listening(living) | self._ports) & _all_listening()),
            "shared-memory segments": len(segments),
            "temporary files": len(files),
        }


def _as_in_a_terminal() -> None:
    """What a shell starts in the background ignores Ctrl-C; and nobody outlives the benchmark."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _all_listening() -> set[str]:
    """Inodes of the sockets on which somebody listens."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
            found |= {row[9] for row in rows if row[3] == _LISTENS}
    return found


def _listening(pids: list[int]) -> set[str]:
    """Of these, the ones that are held by `pids`."""
    held = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    return held & _all_listening()
