"""Small agreements between a process and those it starts: nobody outlives a run, nor does what it writes aside."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

_DIE_WITH_PARENT = "GRADSYNC_DIE_WITH_PARENT"
_DIES_WITH_PARENT = "GRADSYNC_DIES_WITH_PARENT"
"""The process that got the signal: variables are inherited, the signal is not."""
SUPERVISED = "GRADSYNC_SUPERVISED"
"""Number of the process that watches over the run, see ``supervisor.py``."""
FAILURES = "GRADSYNC_FAILURES"
"""Folder in which a run's processes note why they failed, see ``failures.py``."""
RUN_DIR = "GRADSYNC_RUN_DIR"
"""Folder of the run that a process has begun, for those that it starts."""
_PR_SET_PDEATHSIG = 1
_PREFIX = "gradsync-"
_SHORT_FOLDER = "/tmp"


def mark_children() -> None:
    """Those that this process starts from now on end with it: they have to call :func:`die_with_parent`."""
    os.environ[_DIE_WITH_PARENT] = str(os.getpid())


def end_with(parent: int) -> None:
    """End this process when ``parent``, which started it, ends, and at once if it has already; called first thing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_parent() -> None:
    """End this process when the one that started it ends, if that is one of ours; mark our own children likewise."""
    if parent := os.environ.get(_DIE_WITH_PARENT):
        end_with(int(parent))
        os.environ[_DIES_WITH_PARENT] = str(os.getpid())
    mark_children()


def starts_a_run() -> bool:
    """Whether a user started this process, and not a launcher (ours, torchrun) that has already begun the run."""
    return not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", SUPERVISED} & os.environ.keys()


def is_supervised() -> bool:
    return SUPERVISED in os.environ


def is_started_by_rank_zero() -> bool:
    """Whether another training or serving process started this one, and not a user, a supervisor or torchrun."""
    is_child = os.environ.get(_DIES_WITH_PARENT) == str(os.getpid())
    return is_child and os.environ.get(SUPERVISED) != str(os.getppid())


def living_descendants() -> list[int]:
    """Children of this process, theirs, and so on; those that have ended are left out."""
    parents: dict[int, int] = {}
    ended: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parents[int(stat.parent.name)] = int(parent)
            if state in ("Z", "X"):
                ended.add(int(stat.parent.name))
    found = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return sorted(found - ended - {os.getpid()})


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
    leaked = {"LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    leaked |= {SUPERVISED, FAILURES, RUN_DIR}
    environment = {k: v for k, v in os.environ.items() if k not in leaked}
    return {**environment, _DIE_WITH_PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}


def make_private_folder(purpose: str, max_path: int | None = None) -> Path:
    """A new temporary folder that only this user may enter; first, what killed processes left is removed.

    ``max_path``: longest path of the temporary folder that will do (Unix sockets have a limit); /tmp otherwise.
    """
    base = tempfile.gettempdir()
    if max_path is not None and len(base) > max_path:
        base = _SHORT_FOLDER
    remove_stale_folders(Path(base))
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{purpose}-", dir=base))


def remove_stale_folders(base: Path | None = None) -> None:
    """Remove folders in ``base`` whose process has ended, ours and multiprocessing's: a killed one cannot tidy up.

    Without ``base``: wherever we make such folders.
    """
    if base is None:
        for usual in {tempfile.gettempdir(), _SHORT_FOLDER}:
            remove_stale_folders(Path(usual))
        return
    for folder in base.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in base.glob("pymp-*"):  # Python's own: a loader's worker that is killed leaves it
        with contextlib.suppress(OSError):
            if (sockets := list(folder.iterdir())) and not any(map(_is_answered, sockets)):
                shutil.rmtree(folder)


def _is_answered(path: Path) -> bool:
    """Whether a process listens on this Unix socket; true for what cannot be told."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
