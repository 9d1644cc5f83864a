"""What makes the messages between a worker and a server a stream that survives its connection.

A header goes before every message: the conversation's token, the message's number, and how many messages of the other
side have come. Who receives takes the next number only, so that nothing comes twice or out of order; who sends keeps
what the other side has not confirmed, and sends it again after a reconnect (go-back-N). Code for sockets:
:mod:`.links`.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from typing import Any, final

_HEADER = struct.Struct("<16sQQ")
RESUME = 0
"""Instead of a number, from a worker: I am connected, again maybe; from a server: so much has come."""
LAST = 2**64 - 1
"""From a worker: this was all; tell me when you have it."""


class NotAMessage(Exception):
    """Whoever sent this does not speak our protocol."""


def make_token() -> bytes:
    """Names a conversation; nobody else can guess it."""
    return os.urandom(16)


def parse(frame: Any) -> tuple[bytes, int, int]:
    """``(token, number, confirmed)``. Raises NotAMessage."""
    if len(frame) != _HEADER.size:
        raise NotAMessage
    return _HEADER.unpack(frame)


@final
class Conversation:
    """One side of it.

    Attributes:
        token: Both sides' name for it.
        has_ended: The worker has said :data:`LAST`.
    """

    def __init__(self, token: bytes) -> None:
        self.token = token
        self.has_ended = False
        self._num_sent = 0
        self._num_received = 0
        self._unconfirmed: deque[list[Any]] = deque()

    @property
    def is_confirmed(self) -> bool:
        """Whether all that was sent has come."""
        return not self._unconfirmed

    def wrap(self, frames: list[Any]) -> list[Any]:
        """A message to send. Its memory may change only when the other side has answered it."""
        self._num_sent += 1
        self._unconfirmed.append(frames)
        return [_HEADER.pack(self.token, self._num_sent, self._num_received), *frames]

    def control(self, number: int) -> list[Any]:
        """:data:`RESUME` or :data:`LAST`."""
        return [_HEADER.pack(self.token, number, self._num_received)]

    def confirm(self, num_received: int) -> None:
        """The other side has so many."""
        for _ in range(num_received - (self._num_sent - len(self._unconfirmed))):
            if self._unconfirmed:
                self._unconfirmed.popleft()

    def is_next(self, number: int) -> bool:
        """Whether a message is to be taken; the one before it is lost, or it has come already, if not."""
        if number != self._num_received + 1:
            return False
        self._num_received = number
        return True

    def again(self) -> list[list[Any]]:
        """Messages that the other side has not confirmed."""
        first = self._num_sent - len(self._unconfirmed) + 1
        return [
            [_HEADER.pack(self.token, number, self._num_received), *frames]
            for number, frames in enumerate(self._unconfirmed, first)
        ]
