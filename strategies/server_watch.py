"""Nobody waits for a server that is gone: every other process of the run watches, and one of them says so."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import final

from .rendezvous import remove_socket_folder

_GRACE_MS = 2000
"""A server that fails sends its reason before it ends: so long the main thread has to take it up."""


@final
class ServerWatch:
    """Ends this process, at once and with code 1, when a server of its run has ended before :meth:`stop`.

    It sleeps in a thread of its own, since the main thread may be anywhere: in a forward pass, in a collective,
    waiting for the store that died with server 0. Where a supervisor watches over the run (see ``supervisor.py``)
    there is no need for it.

    Args:
        pids: Of the servers to watch, by number; all on this host.
        speaks_for: Numbers of the servers whose end this process tells on stderr.
        endpoints: Those of all servers: a killed one cannot remove its socket's folder.
    """

    def __init__(self, pids: Mapping[int, int], speaks_for: Sequence[int], endpoints: Sequence[str]) -> None:
        self._speaks_for = speaks_for
        self._endpoints = endpoints
        self._stop_reader, self._stop_writer = os.pipe()
        self._servers = {_open(pid): number for number, pid in pids.items()}
        self._thread = threading.Thread(target=self._run, name="server watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From here on servers may end; returns when nothing watches any more."""
        os.close(self._stop_writer)
        self._thread.join()
        if 0 in self._speaks_for and 0 in _ended(self._servers):  # the main thread was quicker to notice
            _tell_of(0)
        for descriptor in (self._stop_reader, *self._servers):
            os.close(descriptor)

    def _run(self) -> None:
        poller = select.poll()
        for descriptor in (self._stop_reader, *self._servers):
            poller.register(descriptor, select.POLLIN)
        poller.poll()
        stopping = select.poll()
        stopping.register(self._stop_reader, select.POLLIN)
        if not stopping.poll(_GRACE_MS):
            # Only now: killed server 0 takes the others with it, and may be seen to have ended after them.
            self._end(min(_ended(self._servers)))

    def _end(self, server: int) -> None:
        for endpoint in self._endpoints:
            remove_socket_folder(endpoint)
        if server in self._speaks_for:
            _tell_of(server)
        os._exit(1)


def _ended(servers: Mapping[int, int]) -> list[int]:
    """Numbers of those that have, by their descriptors."""
    poller = select.poll()
    for descriptor in servers:
        poller.register(descriptor, select.POLLIN)
    return [servers[descriptor] for descriptor, _ in poller.poll(0)]


def _tell_of(server: int) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"gradsync: error: server {server} was killed: it ended without a word (out of memory?)\n")
        sys.stderr.flush()


def _open(pid: int) -> int:
    """A descriptor that becomes readable when the process has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended already: the reading end of a pipe that nobody writes to
        reader, writer = os.pipe()
        os.close(writer)
        return reader
