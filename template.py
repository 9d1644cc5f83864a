"""More processes of a run, forked from one that has loaded everything: to load torch and Lightning again takes seconds.

The first process of a run forks a *template* when it has imported what it needs and has done nothing else. The template
only waits. Where one of Lightning's launchers would start a new interpreter, the template forks: the new process goes
on from where the template was made, with the environment that it was to be started with, as a child of the first.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Final, final

from .errors import UserError
from .failures import FailureRecords
from .processes import die_with_parent, end_with

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NAME: Final = 15
_FOR_THE_RUN: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to a whole group, they are for those that train: the template ends with the first process."""

_requests: socket.socket | None = None
"""To this process's template, if it has one."""


def keep_template() -> None:
    """Fork the template. Returns here, and once more in each process that :func:`start_process` starts."""
    global _requests
    ours, theirs = socket.socketpair()
    first = os.getpid()
    gc.freeze()  # what is loaded stays: no collection touches, and thereby copies, the pages that all share
    sys.stdout.flush()
    sys.stderr.flush()
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_RUN)
    is_first = os.fork() != 0
    handlers = {} if is_first else {number: signal.signal(number, signal.SIG_IGN) for number in _FOR_THE_RUN}
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    if is_first:
        theirs.close()
        _requests = ours
        return
    ours.close()
    end_with(first)
    _name("template")
    _serve(theirs, handlers)


def drop_template() -> None:
    """End it, and wait until it has. No effect in a process without one."""
    global _requests
    if _requests is not None:
        _requests.shutdown(socket.SHUT_WR)
        _requests.recv(1)
        _requests.close()
        _requests = None


def start_process(command: list[str], env: dict[str, str], cwd: str | None = None) -> subprocess.Popen[bytes]:
    """A process of this run, from the template where there is one; otherwise as ``subprocess.Popen`` does.

    Raises:
        UserError: it cannot be started.
    """
    if _requests is None or cwd is not None:
        return subprocess.Popen(command, env=env, cwd=cwd)
    return _Forked(command, env=env)


@final
class _Forked(subprocess.Popen):
    """Waited for and sent signals as any child."""

    def _execute_child(self, *given: Any) -> None:  # where Popen starts it
        environment = given[6]
        assert _requests is not None
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            _requests.sendall(json.dumps(environment).encode() + b"\n")
            answer = _requests.recv(100)
        except ConnectionError:
            answer = b""
        finally:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if not answer.isdigit():
            raise UserError(f"a process of this run cannot be started: {answer.decode() or 'its template has ended'}")
        self.pid = int(answer)
        self._child_created = True


def _serve(requests: socket.socket, handlers: dict[signal.Signals, Any]) -> None:
    """In the template: return in new processes only, with these signal handlers."""
    for line in requests.makefile("rb"):
        try:
            between = os.fork()
        except OSError as error:
            requests.sendall(str(error).encode())
            continue
        if between == 0:
            _fork_for_first_process()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            _become(json.loads(line))
            requests.sendall(str(os.getpid()).encode())
            requests.close()
            return
        os.waitpid(between, 0)
    os._exit(0)


def _fork_for_first_process() -> None:
    """Return in a child that the first process adopts, since this process ends."""
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)


def _become(environment: dict[str, str]) -> None:
    """The process that was to be started with this environment: what modules took from it when imported, as well."""
    import numpy
    import torchmetrics.utilities.prints
    from lightning.fabric.utilities import rank_zero

    os.environ.clear()
    os.environ.update(environment)
    die_with_parent()
    FailureRecords().introduce()
    _name(environment["LOCAL_RANK"])
    numpy.random.seed()
    rank = rank_zero._get_rank() or 0
    for owner in (rank_zero.rank_zero_only, torchmetrics.utilities.prints.rank_zero_only):
        setattr(owner, "rank", rank)  # noqa: B010 (a function attribute)


def _name(suffix: str) -> None:
    """What ``ps -o comm`` and ``top`` show."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"gradsync:{suffix}".encode())
