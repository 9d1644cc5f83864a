"""Sockets over TCP that go on after their connection was cut: every message is delivered once, and in order.

They take the place of the plain ZeroMQ sockets of a server (ROUTER) and a worker (DEALER), which lose what was under
way. What makes it so is in :mod:`.conversation`. Every connection of a worker has a routing id of its own,
``RANK:RANDOM``, so that a new one never meets the remains of the old; to the server's code it is just ``RANK``.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

import zmq
from zmq.utils.monitor import recv_monitor_message

from .client import ServerFailed
from .conversation import LAST, RESUME, Conversation, NotAMessage, make_token, parse
from .gate import Gate

_GONE_S = 3.0
"""A worker that has said its last words waits so long for a server that cannot be reached."""
_FAREWELL_S = 2.0
"""A server waits so long for workers that want to know whether their last words have come."""
_BACKOFF_S = 0.1
"""Between two connections: whoever accepts and hangs up is not asked all the time."""
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_CONNECT_RETRIED
_PROBE_S = 1.0


@final
class DealerLink:
    """A worker's side; used like the DEALER socket it holds.

    Args:
        make_socket: A DEALER that will connect to the server, with all options but its routing id.
        endpoint: Of the server.
        identity: Of the worker, by which the server knows it.
        elsewhere: What to call a server on another host, of whose end nothing else tells; None for one on this host.
    """

    def __init__(
        self, make_socket: Callable[[], zmq.Socket[bytes]], endpoint: str, identity: bytes, elsewhere: str | None = None
    ) -> None:
        self._make_socket = make_socket
        self._endpoint = endpoint
        self._identity = identity
        self._elsewhere = elsewhere
        self._talk = Conversation(make_token())
        self._ready: deque[list[zmq.Frame]] = deque()
        self._is_connected = False
        self._is_refused = False
        self._connect()

    def _connect(self) -> None:
        self._socket = self._make_socket()
        self._socket.routing_id = self._identity + b":" + os.urandom(8)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(self._endpoint)
        self._socket.send_multipart(self._talk.control(RESUME))

    def send_multipart(self, frames: list[Any], flags: int = 0, copy: bool = True) -> None:
        self._socket.send_multipart(self._talk.wrap(frames), flags, copy=copy)

    def poll(self, timeout_ms: int) -> bool:
        """Whether a message is there, after so long at most.

        Raises:
            ServerFailed: the server does not let this worker in, or it has ended.
        """
        deadline = time.monotonic() + timeout_ms / 1000
        while not self._ready:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            events = dict(self._poller.poll(left_ms))
            if self._monitor in events:
                self._follow(recv_monitor_message(self._monitor)["event"])
            elif self._socket in events:
                self._take(self._socket.recv_multipart(copy=False))
            elif left_ms == 0:
                return False
        return True

    def recv_multipart(self, copy: bool = True) -> list[zmq.Frame]:
        while not self.poll(1000):
            pass
        return self._ready.popleft()

    def _follow(self, event: int) -> None:
        """What has become of the connection. Of a new one nobody knows the routing id, so say who this is."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._is_refused = True  # libzmq does not try again, so that sending would block
            raise ServerFailed(
                "the server does not know this worker's key: is --trainer.strategy.keys the same on both sides?"
            )
        self._is_connected = event == zmq.EVENT_CONNECTED
        if event == zmq.EVENT_DISCONNECTED:
            while self._socket.poll(0):  # what has come before: a server's last words, if nothing else
                self._take(self._socket.recv_multipart(copy=False))
            self._disconnect()
            time.sleep(_BACKOFF_S)
            self._connect()
        if not (self._is_connected or self._ready or self._elsewhere is None) and self._is_gone():
            raise ServerFailed(f"{self._elsewhere} has ended: nobody listens at {self._endpoint} any more")

    def _is_gone(self) -> bool:
        """Whether the server's host says that nobody listens there; where the link is cut, nobody says anything."""
        host, _, port = self._endpoint.removeprefix("tcp://").rpartition(":")
        try:
            sockets.create_connection((host, int(port)), _PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def _disconnect(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        token, number, confirmed = parse(frames[0].buffer)
        if token != self._talk.token:
            return
        self._talk.confirm(confirmed)
        if number == RESUME:
            for message in self._talk.again():
                self._socket.send_multipart(message, copy=False)
        elif self._talk.is_next(number):
            self._ready.append(frames[1:])

    def drain(self, timeout_ms: int) -> None:
        """Block until the server has all that was sent, is gone, or the time is over."""
        now = reached = time.monotonic()
        deadline, asked = now + timeout_ms / 1000, None
        while not (self._talk.is_confirmed or self._is_refused) and now < min(deadline, reached + _GONE_S):
            if asked is not self._socket:
                asked = self._socket
                asked.send_multipart(self._talk.control(LAST))
            self._ready.clear()
            with contextlib.suppress(ServerFailed):
                self.poll(50)
            now = time.monotonic()
            reached = now if self._is_connected else reached

    def close(self) -> None:
        self._disconnect()


@final
class RouterLink:
    """A server's side; used like the ROUTER socket it holds, which must be bound, and mandatory.

    Whatever is not a message of one of the workers is dropped, and its connection cut; see :class:`.Gate` for those
    that say nothing.

    Args:
        socket: Closed by whoever made it, after :meth:`close`.
        num_workers: Their ranks are those below.
    """

    def __init__(self, socket: zmq.Socket[bytes], num_workers: int) -> None:
        self._socket = socket
        self._ranks = {str(rank).encode() for rank in range(num_workers)}
        self._talks: dict[bytes, Conversation] = {}
        self._routes: dict[bytes, bytes] = {}
        self._ready: deque[list[zmq.Frame]] = deque()
        self._gate = Gate(socket)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._gate.monitor, zmq.POLLIN)

    def poll(self, timeout_ms: int) -> bool:
        """Whether a message of a worker is there, after so long at most."""
        deadline = time.monotonic() + timeout_ms / 1000
        while not self._ready:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            events = dict(self._poller.poll(left_ms))
            frames = self._socket.recv_multipart(copy=False) if self._socket in events else None
            self._gate.watch()  # first: it may not know yet of the connection that has spoken
            if frames is not None:
                self._take(frames)
            if not events and left_ms == 0:
                return False
        return True

    def recv_multipart(self, copy: bool = True) -> list[zmq.Frame]:
        while not self.poll(1000):
            pass
        return self._ready.popleft()

    def send_multipart(self, frames: list[Any], flags: int = 0, copy: bool = True) -> None:
        """To the rank in ``frames[0]``. If it is not connected now, it gets this when it is."""
        if frames[0] not in self._talks:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._send(frames[0], self._talks[frames[0]].wrap(frames[1:]), copy)

    def _send(self, rank: bytes, message: list[Any], copy: bool) -> None:
        with contextlib.suppress(zmq.ZMQError):  # cut: its next connection asks for what is missing
            self._socket.send_multipart([self._routes[rank], *message], copy=copy)

    def _take(self, frames: list[zmq.Frame]) -> None:
        rank = frames[0].bytes.partition(b":")[0]
        try:
            if rank not in self._ranks or len(frames) < 2:
                raise NotAMessage
            token, number, confirmed = parse(frames[1].buffer)
            talk = self._talks.setdefault(rank, Conversation(token))
            if talk.token != token:
                raise NotAMessage
        except NotAMessage:
            self._gate.refuse(frames)
            return
        self._gate.admit(frames)
        talk.confirm(confirmed)
        if number in (RESUME, LAST):
            self._answer(rank, frames[0].bytes, number)
        elif self._routes.get(rank) == frames[0].bytes and talk.is_next(number):
            self._ready.append([zmq.Frame(rank), *frames[2:]])

    def _answer(self, rank: bytes, route: bytes, number: int) -> None:
        talk = self._talks[rank]
        self._routes[rank] = route
        talk.has_ended |= number == LAST
        self._send(rank, talk.control(RESUME), True)
        for message in talk.again() if number == RESUME else []:
            self._send(rank, message, False)

    def replace(self, lost: bytes, successor: bytes) -> None:
        """Another process may take a worker's place; what the lost one still sends is dropped."""
        self._ranks.discard(lost)
        self._ranks.add(successor)
        self._talks.pop(lost, None)
        self._routes.pop(lost, None)

    def await_farewells(self) -> None:
        """Block until all workers know that their last words have come, but not for long."""
        deadline = time.monotonic() + _FAREWELL_S
        while not all(talk.has_ended for talk in self._talks.values()) and time.monotonic() < deadline:
            self._ready.clear()
            self.poll(50)

    def close(self) -> None:
        self._gate.close()


ServerSocket = zmq.Socket[bytes] | RouterLink
WorkerSocket = zmq.Socket[bytes] | DealerLink
