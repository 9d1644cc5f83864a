"""Small agreements between a process and those it starts: nobody outlives a run, the first error is the one shown."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

_DIE_WITH_PARENT = "GRADSYNC_DIE_WITH_PARENT"
_DIES_WITH_PARENT = "GRADSYNC_DIES_WITH_PARENT"
"""The process that got the signal: variables are inherited, the signal is not."""
_FAILURES = "GRADSYNC_FAILURES"
_PR_SET_PDEATHSIG = 1
_PREFIX = "gradsync-"


def die_with_parent() -> None:
    """End this process when the one that started it ends, if that is one of ours; mark our own children likewise."""
    if os.environ.get(_DIE_WITH_PARENT):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ[_DIES_WITH_PARENT] = str(os.getpid())
    os.environ[_DIE_WITH_PARENT] = "1"


def end_with(parent: int) -> None:
    """In a forked process: end it when ``parent``, the process that forked it, ends; called first thing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def end_with_parent(on: bool) -> None:
    """Switch the signal at the parent's death off and on again in a process that :func:`die_with_parent` gave it."""
    if is_child():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if on else 0)


def is_child() -> bool:
    """Whether a process of ours started this one, and not a user or torchrun."""
    return os.environ.get(_DIES_WITH_PARENT) == str(os.getpid())


def await_children(patience_s: float) -> None:
    """Until all that this process started have ended, but not longer than this."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.02)


def child_environment() -> dict[str, str]:
    """The environment for a run that must end with this process; nothing of a distributed run leaks into it."""
    leaked = {"LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", _FAILURES}
    environment = {k: v for k, v in os.environ.items() if k not in leaked}
    return {**environment, _DIE_WITH_PARENT: "1", "PYTHONUNBUFFERED": "1"}


def make_private_folder(purpose: str, max_path: int | None = None) -> Path:
    """A new temporary folder that only this user may enter; first, what killed processes left is removed.

    ``max_path``: longest path of the temporary folder that will do (Unix sockets have a limit); /tmp otherwise.
    """
    base = tempfile.gettempdir()
    if max_path is not None and len(base) > max_path:
        base = "/tmp"
    remove_stale_folders(Path(base))
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{purpose}-", dir=base))


def remove_stale_folders(base: Path) -> None:
    """Remove our private folders in ``base`` whose process has ended: one that is killed cannot tidy up."""
    for folder in base.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


class FailureRecords:
    """A folder in which the processes of one host note why they end; made by the first, inherited by the others."""

    def __init__(self) -> None:
        self._owner = _FAILURES not in os.environ
        if self._owner:
            os.environ[_FAILURES] = str(make_private_folder("failures"))
        self._folder = Path(os.environ[_FAILURES])

    def note(self, text: str) -> None:
        """Record this process's own error (not that of a peer)."""
        record = {"time": time.time(), "rank": os.environ.get("LOCAL_RANK", "0"), "error": text}
        part = self._folder / f"{os.getpid()}.part"
        if self._folder.is_dir():
            part.write_text(json.dumps(record))
            part.rename(part.with_suffix(".json"))

    def first(self, patience_s: float) -> str | None:
        """``"process 1: its error"`` of whoever failed first, waiting up to ``patience_s`` seconds for one."""
        deadline = time.monotonic() + patience_s
        while True:
            records = [json.loads(path.read_text()) for path in self._folder.glob("*.json")]
            if records:
                first = min(records, key=lambda record: record["time"])
                return f"process {first['rank']}: {first['error']}"
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)

    def close(self) -> None:
        """Remove the folder, if this process made it."""
        if self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.environ.pop(_FAILURES, None)


def first_process_has_tidied_up() -> bool:
    """Whether the process that made the folder of failures has removed it again, as one that is killed cannot."""
    return _FAILURES in os.environ and not Path(os.environ[_FAILURES]).is_dir()


def remove_failure_records() -> None:
    """In place of the process that made the folder and was killed."""
    if _FAILURES in os.environ:
        shutil.rmtree(os.environ[_FAILURES], ignore_errors=True)
