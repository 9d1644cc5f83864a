"""What the processes of a run on one host leave for each other to read: who they are, and why one of them failed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, final

from .processes import FAILURES, make_private_folder


@final
class FailureRecords:
    """A folder of small files, made by the first process of a run and inherited by those that it starts."""

    def __init__(self) -> None:
        self._owner = FAILURES not in os.environ
        if self._owner:
            os.environ[FAILURES] = str(make_private_folder("failures"))
        self._folder = Path(os.environ[FAILURES])

    def introduce(self, name: str | None = None, pid: int | None = None, may_be_lost: bool = False) -> None:
        """Say what this process, or another, is called: ``process`` and its number on this host unless it is known.

        ``may_be_lost``: the run goes on without it.
        """
        name = name or f"process {os.environ.get('LOCAL_RANK', '0')}"
        self._write(f"{pid or os.getpid()}.process", {"name": name, "may_be_lost": may_be_lost})

    def processes(self) -> dict[int, str]:
        """Names of those that have introduced themselves, by process number."""
        return {pid: record["name"] for pid, record in self._introduced().items()}

    def may_be_lost(self, pid: int) -> bool:
        """Whether the run goes on without this process, as far as it has said so."""
        return self._introduced().get(pid, {}).get("may_be_lost", False)

    def _introduced(self) -> dict[int, dict[str, Any]]:
        return {int(path.stem): json.loads(path.read_text()) for path in self._folder.glob("*.process")}

    def note(self, error: str, pid: int | None = None) -> bool:
        """Record why this process fails (by itself, not through a peer), or another one that could not.

        Returns whether it is news: ranks that find the same error together need not all say so.
        """
        pid = pid or os.getpid()
        self._write(f"{pid}.json", {"time": time.time(), "pid": pid, "error": error})
        try:
            (self._folder / hashlib.sha256(error.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk, or the run is over
            pass
        return True

    def first(self, patience_s: float = 0.0) -> str | None:
        """``"worker 1: its error"`` of whoever failed first, waiting up to ``patience_s`` seconds for one."""
        deadline = time.monotonic() + patience_s
        while not (records := [json.loads(path.read_text()) for path in self._folder.glob("*.json")]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)
        first = min(records, key=lambda record: record["time"])
        return f"{self.processes().get(first['pid'], 'a process')}: {first['error']}"

    def _write(self, name: str, content: dict[str, Any]) -> None:
        part = self._folder / f"{name}.part"
        with contextlib.suppress(OSError):  # the run is over; or the disk is full, which is for others to say
            part.write_text(json.dumps(content))
            part.rename(self._folder / name)

    def clear(self) -> None:
        """Forget the processes of a run that is over, why they failed, and what else they have left here."""
        for path in self._folder.iterdir():
            path.unlink()

    def close(self) -> None:
        """Remove the folder, if this process made it."""
        if self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.environ.pop(FAILURES, None)


def introduce(name: str, pid: int | None = None, may_be_lost: bool = False) -> None:
    """:meth:`FailureRecords.introduce`, in a run that keeps records."""
    if FAILURES in os.environ:
        FailureRecords().introduce(name, pid, may_be_lost)
