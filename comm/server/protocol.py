"""Messages between workers and the parameter server: nothing on the wire is ever unpickled.

A message is a fixed header, a JSON text and at most one tensor payload, three ZeroMQ frames. Phases of a run,
named as in :mod:`.client` and :mod:`.server`:

1. *hello*: every worker sends its tensor table; the server compares it with its own and refuses by name.
2. *init*: worker 0 sends the values the run starts from; the server then answers everybody with *welcome*.
3. *step*, repeated: *step* (learning rates, clipping, which parameters have gradients), then *push* parts;
   the server steps and answers with *pull* parts and *done*. Between two steps a worker may ask for the current
   parameters (*fetch*, answered alike), and ask for or set the optimizer state (*get_state*, *set_state*).
4. *grow*, between two steps: a worker in which parameters have become trainable, or parameter groups were added, asks
   the server to take them in, with their values (answered by *grown*); the other workers ask for the same.
5. *bye*: each worker leaves; the server ends when all have. *fail* instead carries an error text.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .layout import travelling_dtype

_HEADER = struct.Struct("<BBHI")  # kind, optimizer, bucket, part


class Kind(IntEnum):
    HELLO = 1
    INIT = 2
    WELCOME = 3
    STEP = 4
    PUSH = 5
    PULL = 6
    DONE = 7
    GET_STATE = 8
    SET_STATE = 9
    STATE = 10
    BYE = 11
    FAIL = 12
    FETCH = 13
    GROW = 14
    GROWN = 15


class ProtocolError(Exception):
    """The peer sent something that the agreed tensor table does not allow."""


@dataclass(frozen=True)
class Message:
    kind: Kind
    optimizer: int = 0
    bucket: int = 0
    part: int = 0
    info: Any = None
    """JSON-compatible."""
    payload: Any = None
    """Bytes-like, one tensor or part of a bucket in native byte order."""

    def frames(self) -> list[Any]:
        header = _HEADER.pack(self.kind, self.optimizer, self.bucket, self.part)
        text = b"" if self.info is None else json.dumps(self.info).encode()
        return [header, text, b"" if self.payload is None else self.payload]

    @staticmethod
    def parse(frames: list[Any]) -> Message:
        """Frames are bytes-like. Raises ProtocolError on anything but three well-formed frames."""
        if len(frames) != 3 or len(frames[0]) != _HEADER.size:
            raise ProtocolError(f"expected 3 frames with a header of {_HEADER.size} bytes, got {len(frames)} frames")
        kind, optimizer, bucket, part = _HEADER.unpack(frames[0])
        try:
            info = json.loads(bytes(frames[1])) if len(frames[1]) else None
            return Message(Kind(kind), optimizer, bucket, part, info, frames[2])
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"unreadable message of kind {kind}: {error}") from error


def table_of(named_parameters: list[tuple[str, Tensor]], wire_dtype: torch.dtype | None = None) -> list[list[Any]]:
    """What both sides must agree on: ``[name, shape, stride, dtype, trainable, dtype on the wire]`` per parameter."""
    return [
        [n, list(p.shape), list(p.stride()), str(p.dtype), p.requires_grad, str(travelling_dtype(p.dtype, wire_dtype))]
        for n, p in named_parameters
    ]


def first_difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str | None:
    """Name the first parameter in which two tables differ, None if they agree."""
    for ours, other in zip(mine, theirs, strict=False):
        if ours != other:
            return f"server has {ours}, worker has {other} (name, shape, stride, dtype, trainable, wire dtype)"
    if len(mine) != len(theirs):
        name = max(mine, theirs, key=len)[min(len(mine), len(theirs))][0]
        return f"server has {len(mine)} parameters, worker {len(theirs)}; only one of them has {name!r}"
    return None
