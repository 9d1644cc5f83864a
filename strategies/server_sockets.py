"""The sockets of one run of the parameter server: a server's bound one, or a worker's, one to every server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import zmq

from .rendezvous import make_socket_folder, remove_socket_folder


@final
class ServerSockets:
    """Made after the processes were started: a ZeroMQ context does not survive a fork.

    Attributes:
        sockets: Of a server the only one (ROUTER); of a worker one per server (DEALER).
        endpoints: Where they are bound or connected to.
    """

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []
        self.endpoints: list[str] = []

    def bind(self, over_tcp: bool) -> str:
        """Server: listen on loopback, or on a Unix socket in a private folder; returns the endpoint."""
        socket = self._make(zmq.ROUTER)
        socket.router_mandatory = True
        if over_tcp:
            self.endpoints = [f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"]
        else:
            self.endpoints = [f"ipc://{make_socket_folder() / 'server'}"]
            socket.bind(self.endpoints[0])
        return self.endpoints[0]

    def connect(self, endpoints: Sequence[str], rank: int) -> None:
        """Worker ``rank``: connect to all servers."""
        self.endpoints = list(endpoints)
        for endpoint in endpoints:
            socket = self._make(zmq.DEALER)
            socket.routing_id = str(rank).encode()
            socket.connect(endpoint)

    def _make(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # what is under way is bounded by one step; dropping would lose gradients
        self.sockets.append(socket)
        return socket

    def close(self, linger_ms: int) -> None:
        """Close all, giving what was sent at most ``linger_ms`` to leave."""
        self._context.destroy(linger_ms)
        for endpoint in self.endpoints:
            remove_socket_folder(endpoint)
