"""The sending side of hostile messages that go through a real TCP socket."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from typing import final

import zmq
from fuzz_frames import MUTATIONS, Frames, Talk, mutate
from fuzz_server import NAMES, Target

_WINDOW = 100
"""Messages under way at most."""
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity"


@final
class Attacker:
    """Sends to a :class:`.Target`.

    Attributes:
        num_raw: Connections on which bytes of ZeroMQ's own protocol went, mutated.
    """

    def __init__(self, target: Target, talk: Talk, rng: random.Random) -> None:
        self._target = target
        self._talk = talk
        self._rng = rng
        self._context = zmq.Context()
        self._dealers = [self._connect(name) for name in NAMES]
        self._num_sent = 0
        self.num_raw = 0
        host, _, port = target.endpoint.removeprefix("tcp://").partition(":")
        self._address = (host, int(port))

    def _connect(self, name: bytes) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger, dealer.routing_id = 0, name
        dealer.connect(self._target.endpoint)
        return dealer

    def attack(self, is_raw: bool) -> None:
        """One hostile message, or one connection of hostile bytes."""
        frames = self._hostile()
        if is_raw:
            self._send_raw(frames)
            self.num_raw += 1
            return
        self._rng.choice(self._dealers).send_multipart(frames[1:] or [b""])
        self._num_sent += 1
        if self._num_sent % _WINDOW == 0:
            self._target.wait_for(self._num_sent - _WINDOW, 1.0)

    def _hostile(self) -> Frames:
        return mutate(self._rng.choice(list(MUTATIONS)), self._talk, self._rng.randrange(len(self._talk)), self._rng)

    def _send_raw(self, frames: Frames) -> None:
        stream = bytearray(_zmtp(frames, self._rng.choice([b"8", b"9"])))
        for _ in range(self._rng.choice([0, 1, 1, 3])):
            stream[self._rng.randrange(len(stream))] ^= 1 << self._rng.randrange(8)
        with contextlib.suppress(OSError), socket.create_connection(self._address, timeout=5) as client:
            if self._rng.random() < 0.5:  # the end is a reset: nothing of it waits for anybody
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(stream[: self._rng.randrange(1, len(stream) + 1)])

    def is_answered(self, limit_s: float) -> bool:
        """Whether the server deals with all that it was sent, in time."""
        return self._target.wait_for(self._num_sent, limit_s)

    def close(self) -> None:
        self._context.destroy(0)


def _zmtp(frames: Frames, name: bytes) -> bytes:
    """What a DEALER that is called ``name`` sends (ZMTP 3.0, https://rfc.zeromq.org/spec/23)."""
    ready = _READY + struct.pack(">I", len(name)) + name
    message = b"".join(
        bytes([2 | (index < len(frames) - 1)]) + struct.pack(">Q", len(frame)) + frame
        for index, frame in enumerate(frames)
    )
    return _GREETING + bytes([4, len(ready)]) + ready + message
