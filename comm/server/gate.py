"""Keeps foreign programs from using up a server's descriptors."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import time
from typing import Any, final

import zmq
from zmq.utils.monitor import recv_monitor_message

MOST_SILENT = 16
"""Connections that have not said anything of use yet; of more, the oldest are cut."""
HELLO_S = 5.0
"""How long a connection may take to say something."""


@final
class Gate:
    """Counts the connections of a bound ROUTER on TCP that have not spoken yet, and cuts them.

    libzmq itself accepts as many as come, and only limits how long the handshake of its own protocol may take. Where
    they are is known from its monitor (ACCEPTED gives the descriptor), who spoke from the message (``ZMQ_SRCFD``).

    A descriptor may have become another connection's by the time it is cut, as libzmq works in a thread of its own. It
    is looked at first, so it can only be one to the same port: a worker, which reconnects and loses nothing.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._silent: dict[int, float] = {}
        """Since when, by descriptor; the oldest first."""

    def watch(self) -> None:
        """Take up what has happened; cheap if nothing has."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)
            self._silent.pop(event["value"], None)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._silent[event["value"]] = time.monotonic()
        now = time.monotonic()
        for descriptor, since in list(self._silent.items()):
            if len(self._silent) <= MOST_SILENT and now - since < HELLO_S:
                break
            self._cut(descriptor)

    def admit(self, frames: list[Any]) -> None:
        """A worker has spoken there."""
        if self._silent:
            self._silent.pop(frames[1].get(zmq.SRCFD), None)

    def refuse(self, frames: list[Any]) -> None:
        """Somebody else has."""
        self._cut(frames[-1].get(zmq.SRCFD))

    def _cut(self, descriptor: int) -> None:
        self._silent.pop(descriptor, None)
        with contextlib.suppress(OSError), sockets.socket(fileno=os.dup(descriptor)) as connection:
            name = connection.getsockname()
            if isinstance(name, tuple) and name[1] == self._port:
                connection.shutdown(sockets.SHUT_RDWR)

    def close(self) -> None:
        self._socket.disable_monitor()
        self.monitor.close(0)
