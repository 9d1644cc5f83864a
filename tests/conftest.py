"""For every test: one thread per rank, loopback only, and proof that nothing is left behind."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
# LightningCLI uses an old name of jsonargparse's add_instantiator and the like; nothing of ours.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# A folder of our own for temporary files: other people's runs on this machine are not our leaks.
tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="gradsync-tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

_PATIENCE_S = 5.0


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


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves a process or a temporary file; undo what Lightning leaves in the environment."""
    environment, children, files = dict(os.environ), _children(), _temporary_files()
    yield
    os.environ.clear()
    os.environ.update(environment)
    deadline = time.monotonic() + _PATIENCE_S
    while _children() - children and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _children() - children, "the test left processes running"
    assert not _temporary_files() - files, "the test left temporary files"
