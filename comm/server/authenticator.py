"""Who may connect to a server with CURVE keys: ZeroMQ asks here during the handshake (ZAP, RFC 27)."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from typing import final

import zmq
from zmq.utils import z85

_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"


@final
class Authenticator:
    """Answers in a thread of its own, which sleeps but in handshakes, until :meth:`close`.

    Start it before the server's socket binds, with that socket's context; close it before the context.

    Args:
        context: Of the sockets whose peers are judged; one authenticator per context.
        known: Public keys (Z85, 40 characters) of those who may connect.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], known: Collection[bytes]) -> None:
        self._known = {z85.decode(key) for key in known}
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)
        self._stop_reader, self._stop_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="authenticator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._stop_writer)
        self._thread.join()
        os.close(self._stop_reader)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_reader, zmq.POLLIN)
        while self._stop_reader not in dict(poller.poll()):
            self._socket.send_multipart(self._judge(self._socket.recv_multipart()))
        self._socket.close()

    def _judge(self, request: list[bytes]) -> list[bytes]:
        """``request``: version, number, domain, address, routing id, mechanism, credentials."""
        number, mechanism = request[1], request[5]
        is_known = mechanism == b"CURVE" and request[6] in self._known
        status = [b"200", b"OK", b"worker"] if is_known else [b"400", b"unknown key", b""]
        return [_VERSION, number, *status, b""]
