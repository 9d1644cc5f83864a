"""Processes that are forked for a check: they tell their parent how far they are, and never outlive it.

A library that hangs or crashes, a driver for instance, does so there, and the parent can say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, final

from ..comm.diagnosis import is_lost_peer
from ..processes import end_with

Message = dict[str, Any]
Tell = Callable[[Message], None]
Body = Callable[[Tell], None]
_CTRL_C = {signal.SIGINT}
_END_S = 3.0


@final
class Child:
    """Runs ``body(tell)`` in a forked process. What it tells, JSON-compatible, comes out of :func:`listen`.

    An exception is told as ``{"error": text, "is_lost_peer": ...}``. The process stays until it is killed, so that
    its peers lose no connection while they are still at work.
    """

    def __init__(self, body: Body) -> None:
        reader, writer = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        # Python loses a Ctrl-C in the functions that it calls at a fork, and the child must not see it at all.
        signal.pthread_sigmask(signal.SIG_BLOCK, _CTRL_C)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _run(body, writer, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _CTRL_C)
        os.close(writer)
        self.reader = reader
        self.signal: int | None = None
        self._rest = b""
        self.has_ended = False

    def receive(self) -> list[Message] | None:
        """What can be read now, None at the end."""
        data = os.read(self.reader, 65536)
        if not data:
            self._reap()
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def is_stopped(self) -> bool:
        """By a signal such as SIGSTOP, or a debugger."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def end(self) -> None:
        """Kill it, if it is still there. One that waits for a dead disk or driver ends when that lets go of it."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGKILL)  # its number is not given away before it is reaped
            deadline = time.monotonic() + _END_S
            while not self.has_ended and time.monotonic() < deadline:
                self._reap(os.WNOHANG)
                time.sleep(0.002)
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def _reap(self, options: int = 0) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.has_ended = True
            self.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def _run(body: Body, writer: int, parent: int) -> NoReturn:
    def tell(message: Message) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, json.dumps(message).encode() + b"\n")

    try:
        end_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CTRL_C)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)  # backends write lines of their own
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        body(tell)
        while True:
            signal.pause()
    except BaseException as error:
        tell({"error": str(error) or type(error).__name__, "is_lost_peer": is_lost_peer(error)})
    finally:
        os._exit(1)


def listen(children: dict[int, Child], patience_s: float) -> Iterator[tuple[int, Message | None]]:
    """(key, message) as they come; None in its place for a child that has ended. Blocks.

    Ends when all have ended, or ``patience_s`` after the last message.
    """
    with selectors.DefaultSelector() as selector:
        for key, child in children.items():
            selector.register(child.reader, selectors.EVENT_READ, key)
        deadline = time.monotonic() + patience_s
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for ready, _ in selector.select(left):
                messages = children[ready.data].receive()
                if messages is None:
                    selector.unregister(ready.fileobj)
                    yield ready.data, None
                for message in messages or []:
                    deadline = time.monotonic() + patience_s
                    yield ready.data, message


def ask_in_child(question: Callable[[], Message], patience_s: float) -> Message:
    """The answer; ``{"error": text}`` if there is none, because the question raised, crashed, or took too long."""
    try:
        child = Child(lambda tell: tell(question()))
    except OSError as error:
        return {"error": f"no process can be started: {error}"}
    try:
        for _, message in listen({0: child}, patience_s):
            return {"error": "it was killed, or crashed"} if message is None else message
        return {"error": f"no answer within {patience_s:g} s"}
    finally:
        child.end()
