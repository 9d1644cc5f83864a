"""For every test: one thread per rank, loopback only, and proof that nothing is left behind."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
# LightningCLI uses an old name of jsonargparse's add_instantiator and the like; nothing of ours.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# A folder of our own for temporary files: other people's runs on this machine are not our leaks.
tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="gradsync-tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

_PATIENCE_S = 30.0
"""A process that was killed takes its time on a busy machine."""
_MARK = "GRADSYNC_SUITE"
"""In the environment of all that the suite starts: the number of pytest's process."""


def _children() -> set[int]:
    """Processes started by this one that still run (zombies do not)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()) and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def _temporary_files() -> set[str]:
    """Ours, but those of runs that were killed and could not tidy up: the next start does that."""
    from gradsync.processes import remove_stale_folders  # torch reads the environment above when imported

    folder = Path(tempfile.gettempdir())
    remove_stale_folders(folder)
    return {path.name for path in folder.glob("gradsync-*")}


@pytest.fixture(autouse=True, scope="session")
def suite_leaves_nothing_behind() -> Iterator[None]:
    """After the last test: no process of the suite, however far it went, no port, shared memory or temporary file."""
    from commands import preloaded  # loads torch, as above

    os.environ[_MARK], shared = str(os.getpid()), _shared_memory()
    with preloaded():
        yield

    def left() -> dict[str, object]:
        listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        # torchrun, torch's compiler and Chromium leave theirs there.
        files = _temporary_files() | {path.name for path in Path(tempfile.gettempdir()).glob("pymp-*")}
        memory = _shared_memory() - shared
        return {"processes": _marked(), "shared memory": memory, "open ports": listening, "temporary files": files}

    _assert_nothing("the suite", left)


def _assert_nothing(whose: str, left: Callable[[], dict[str, object]]) -> None:
    """Soon: what ends is given the time to."""
    deadline = time.monotonic() + _PATIENCE_S
    while any((found := left()).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(found.values()), f"{whose} left { ({what: those for what, those in found.items() if those}) }"


def _shared_memory() -> set[str]:
    """Of this user, but what processes that are not of this suite use."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):  # it has gone
            if path.stat().st_uid == os.getuid():
                found.add(path.name)
    return found - _used_by_others() if found else found


def _used_by_others() -> set[str]:
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={os.getpid()}".encode() in (process / "environ").read_bytes().split(b"\0"):
                continue
            if int(process.name) != os.getpid():
                places = [os.readlink(link) for link in (process / "fd").iterdir()]
                places += (process / "maps").read_text().splitlines()
                places.append(os.readlink(process / "cwd"))
                used |= {place.partition("/dev/shm/")[2].partition("/")[0] for place in places}
    return used


def _marked() -> list[str]:
    """Command lines of the other processes of this suite, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(_MARK) == str(os.getpid()):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves a process or a temporary file; undo what Lightning leaves in the environment."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # loads torch, as above

    environment, children, files = dict(os.environ), _children(), _temporary_files()
    yield
    setattr(rank_zero_only, "rank", 0)  # noqa: B010 (a function attribute, which strategies set)
    os.environ.clear()
    os.environ.update(environment)
    _assert_nothing(
        "the test",
        lambda: {"processes running": _children() - children, "temporary files": _temporary_files() - files},
    )
    ctypes.CDLL(None).malloc_trim(0)  # what a test has freed is copied with every process that others fork
