"""One ``gradsync fit`` in processes of its own, for the commands that run many of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from .processes import child_environment

_END_PATIENCE_S = 10.0


@contextmanager
def running_fit(arguments: list[str], output: int | IO[str]) -> Iterator[subprocess.Popen[str]]:
    """``gradsync ARGUMENTS`` in a session of its own, within the block: at its end, nothing of the session is left.

    Only for the main thread. One thread per rank unless the user says otherwise: ranks share the cores.

    Args:
        output: Where stdout and stderr go, as ``subprocess.Popen`` takes it.
    """
    environment = child_environment()
    environment.setdefault("OMP_NUM_THREADS", "1")
    process = None
    try:
        with _late_interrupt():
            process = subprocess.Popen(
                [sys.executable, "-m", "gradsync", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            )
        yield process
    finally:
        if process is not None:
            _end_group(process)


@contextmanager
def _late_interrupt() -> Iterator[None]:
    """A Ctrl-C within the block is raised at its end: in ``Popen``, it would leave a process that nobody knows of."""
    came: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            raise KeyboardInterrupt


def _end_group(process: subprocess.Popen[Any]) -> None:
    """Ask the process's group to end, then make it."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(_END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            continue


def error_in(lines: list[str]) -> str | None:
    """What a run says of its own failure; a first failure elsewhere counts more than its consequences."""
    said = [line.removeprefix("gradsync: ") for line in lines if line.startswith("gradsync: ")]
    direct = [line for line in said if line.startswith("error: ")]
    return (direct or said or [None])[0]
