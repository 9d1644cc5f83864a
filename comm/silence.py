"""How long a connection to another host may be silent: by itself TCP waits a quarter of an hour for one that is cut."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

_PROBES = 4
"""In the time allowed."""


def limit_silence(port: int, limit_s: float) -> None:
    """Let this process's connections to ``port`` fail when the other side has not answered for so many seconds.

    For connections of libraries that have no such option: a read that waits there raises then, and so does the next
    write. A shorter interruption costs nothing. Called again for connections made since; does not block.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError, ValueError):  # no socket, closed meanwhile, or not connected
            if not os.readlink(Path("/proc/self/fd", str(descriptor))).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                peer = connection.getpeername()
                if isinstance(peer, tuple) and peer[1] == port:
                    _limit(connection, limit_s)


def _limit(connection: socket.socket, limit_s: float) -> None:
    """Data that nobody acknowledges, and, where nothing is under way, probes that nobody answers."""
    every_s = max(1, int(limit_s / _PROBES))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))
