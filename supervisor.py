"""The process that a user starts: it neither trains nor serves, so it lives to tell how each of the others ended.

The first process of the run is its child and starts the others. Whichever of them fails first is named, the rest get
a moment to end by themselves, and then nothing of the run is left. It works below strategies, so under all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final, final

from .failures import FailureRecords
from .processes import SUPERVISED, die_with_parent, living_descendants, mark_children, remove_stale_folders
from .restarts import Restarts

_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
_GRACE_S = 1.5
"""How long the others may take to end when one has failed: all must be out within 3 s."""
_AFTERWARDS_S = 1.0
"""How long what is left may take when the first process has ended."""
_GIVE_UP_S = 10.0
"""How long to wait for a process that even SIGKILL does not end: a driver or a file server holds it."""
_SENT_BY_KERNEL = 128
_ORDERED: Final = {128 + number for number in _PASSED_ON}
"""Exit codes of a run that somebody has stopped."""
_PR_SET_CHILD_SUBREAPER = 36


def go_on_supervised() -> None:
    """Return in a new process, and in another when that run has failed and is to be started again.

    The calling one ends with the run, with its exit code, and never returns.
    """
    records = FailureRecords()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans come to this process
    mark_children()
    os.environ[SUPERVISED] = str(os.getpid())
    # Blocked, they wait until a thread takes them: no handler, no moment in which one is lost. What is ignored (nohup,
    # a shell's background) stays so.
    heard = {number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN}
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    restarts = Restarts()
    signals: int | None = None
    while True:
        first = os.fork()
        if first == 0:
            if signals is not None:
                os.close(signals)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            die_with_parent()
            return
        signals = _listen(heard) if signals is None else signals
        supervisor = _Supervisor(first, records, signals)
        code = supervisor.watch()
        _end_descendants(0.0 if supervisor.has_failure else _AFTERWARDS_S)
        if supervisor.is_stopping or code in _ORDERED or (restart := restarts.next(code)) is None:
            break
        print(f"gradsync: restart {restart.number} of {restart.of}", file=sys.stderr, flush=True)
        restart.announce()
        records.clear()
        supervisor.close()
        remove_stale_folders()
    records.close()
    remove_stale_folders()
    sys.stdout.flush()
    os._exit(code)


@final
class _Supervisor:
    """Watches the run whose first process is ``first``."""

    def __init__(self, first: int, records: FailureRecords, signals: int) -> None:
        self._first = first
        self._records = records
        self._watched: dict[int, int] = {}
        """Process numbers by descriptors that become readable when the process ends."""
        self._poller = select.poll()
        self._status: dict[int, int] = {}
        """Of those that ended as children of this process."""
        self.has_failure = False
        """Whether one of the processes has failed that the first one did not wait for."""
        self.is_stopping = False
        """Whether somebody has told the run to stop."""
        self._signals = signals
        self._poller.register(signals, select.POLLIN)
        self._watch(first)

    def watch(self) -> int:
        """Block until the run is over; its exit code."""
        while (failed := self._failed()) is None:
            if self._first in self._status:
                return self._code_of_first()
            self._find()
        self.has_failure = True
        self._tell(failed)
        deadline = time.monotonic() + _GRACE_S
        while self._first not in self._status and time.monotonic() < deadline:
            self._wait()
        code = self._code_of_first()
        return code if failed == self._first or (code < 128 and code) else 1

    def close(self) -> None:
        for descriptor in self._watched:
            os.close(descriptor)

    def _code_of_first(self) -> int:
        code = os.waitstatus_to_exitcode(self._status[self._first]) if self._first in self._status else 1
        return code if code >= 0 else 128 - code

    def _find(self) -> None:
        """Watch those that are new: they introduce themselves before they do anything else."""
        for pid in self._records.processes().keys() - set(self._watched.values()):
            self._watch(pid)

    def _watch(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            self._watched[descriptor] = pid
            self._poller.register(descriptor, select.POLLIN)

    def _failed(self) -> int | None:
        """Wait a little for a process that ends as it should not; its number."""
        ended = [pid for pid in self._wait() if self._ended_badly(pid)]
        # Its children die with the first one's main thread, and may be seen before its last thread has ended.
        if ended and self._ended_badly(self._first):
            return self._first
        # Whoever has lost a peer ends with a code: seen together, the killed one was the cause.
        return min(ended, key=lambda pid: not os.WIFSIGNALED(self._status_of(pid) or 0), default=None)

    def _wait(self) -> list[int]:
        """Those that have ended since, once each; signals that have come are passed on."""
        ended = []
        for descriptor, _ in self._poller.poll(_POLL_S * 1000):
            if descriptor == self._signals:
                self._pass_on(*os.read(descriptor, 2))
            else:
                self._poller.unregister(descriptor)
                ended.append(self._watched[descriptor])
        self._reap()
        return ended

    def _status_of(self, pid: int) -> int | None:
        """Wait status of a process that has ended, unless its parent has taken it already."""
        return self._status.get(pid, _status_of_zombie(pid))

    def _ended_badly(self, pid: int) -> bool:
        """A first process with an exit code of its own has said why, and is no failure of another's."""
        status = self._status_of(pid)
        if pid == self._first:
            return status is not None and os.WIFSIGNALED(status) and not self.is_stopping
        return bool(status) and not self.is_stopping and not self._records.may_be_lost(pid)

    def _tell(self, pid: int) -> None:
        if self._records.first() is not None:  # whoever failed by itself has said so, and this may be its doing
            return
        status = self._status_of(pid) or 0
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            hint = " (the kernel does so where memory is short)" if number == signal.SIGKILL else ""
            error = f"was killed by {signal.Signals(number).name}{hint}"
        else:
            error = f"ended with code {os.WEXITSTATUS(status)}"
        self._records.note(error, pid)
        name = self._records.processes().get(pid, "process 0")
        print(f"gradsync: error: {name} {error}", file=sys.stderr, flush=True)

    def _pass_on(self, number: int, is_for_all: int) -> None:
        self.is_stopping = True
        if not is_for_all:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, number)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._status[ended[0]] = ended[1]


def _listen(numbers: set[signal.Signals]) -> int:
    """A descriptor from which signals that come can be read, as :func:`_hear` writes them."""
    reader, writer = os.pipe()
    threading.Thread(target=_hear, args=(numbers, writer), name="signals", daemon=True).start()
    return reader


def _hear(numbers: set[signal.Signals], writer: int) -> None:
    """In a thread: signals that come, as two bytes each: number, and whether a terminal has sent it to all already."""
    while True:
        got = signal.sigwaitinfo(numbers)
        os.write(writer, bytes((got.si_signo, got.si_code == _SENT_BY_KERNEL)))


def _status_of_zombie(pid: int) -> int | None:
    """Wait status of a process whose main thread has ended, if nobody has asked for it yet; None for others."""
    try:
        state, *_, status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(status) if state in ("Z", "X") else None


def _end_descendants(patience_s: float) -> None:
    """Whatever the run has started and left behind: by SIGTERM, and by SIGKILL when patience ends."""
    start = time.monotonic()
    while time.monotonic() < start + _GIVE_UP_S:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # who loses its parent becomes a child of this process, so nobody is left at all
            return
        for pid in living_descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < start + patience_s else signal.SIGKILL)
        time.sleep(0.02)
