"""Messages between workers and the parameter server: nothing on the wire is ever unpickled.

A message is a fixed header, a JSON text and at most one tensor payload, three ZeroMQ frames. Phases of a run,
named as in :mod:`.client` and :mod:`.server`:

1. *hello*: every worker sends its tensor table; the server compares it with its own and refuses by name.
2. *init*: worker 0 sends the values the run starts from; the server answers everybody with *welcome*.
3. *step*, repeated: *step* (learning rates, clipping, which parameters have gradients), then *push* parts;
   the server averages, steps and answers with *pull* parts and *done*. A worker may ask for, or set, the
   optimizer state between two steps (*get_state*, *set_state*).
4. *bye*: each worker leaves; the server ends when all have. *fail* instead carries an error text.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_HEADER = struct.Struct("<BBHI")  # kind, optimizer, bucket, part

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


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
        except ValueError as error:
            raise ProtocolError(f"unreadable message of kind {kind}: {error}") from error


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    # numpy has no bfloat16: look at the bytes
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_from(payload: Any, dtype: torch.dtype) -> Tensor:
    """A 1-D tensor over ``payload``'s memory, without a copy; the caller only reads it."""
    return torch.frombuffer(payload, dtype=dtype)


def table_of(named_parameters: list[tuple[str, Tensor]]) -> list[list[Any]]:
    """What both sides must agree on: ``[name, shape, stride, dtype, trainable]`` per parameter, in order."""
    return [[n, list(p.shape), list(p.stride()), str(p.dtype), p.requires_grad] for n, p in named_parameters]


def first_difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str | None:
    """Name the first parameter in which two tables differ, None if they agree."""
    for ours, other in zip(mine, theirs, strict=False):
        if ours != other:
            return f"server has {ours}, worker has {other} (name, shape, stride, dtype, trainable)"
    if len(mine) != len(theirs):
        name = max(mine, theirs, key=len)[min(len(mine), len(theirs))][0]
        return f"server has {len(mine)} parameters, worker {len(theirs)}; only one of them has {name!r}"
    return None


def pack_tree(tree: Any) -> tuple[Any, bytes]:
    """``tree`` (dicts, lists, tuples, scalars, tensors) as JSON-compatible description and one payload.

    Raises:
        TypeError: for a value of any other type, named.
    """
    payload = bytearray()
    return _describe(tree, payload), bytes(payload)


def _describe(tree: Any, payload: bytearray) -> Any:
    if isinstance(tree, Tensor):
        start = len(payload)
        payload += tensor_bytes(tree.cpu().contiguous())
        return {"dtype": str(tree.dtype), "shape": list(tree.shape), "start": start, "end": len(payload)}
    if isinstance(tree, dict):
        return {"items": [[key, _describe(value, payload)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [_describe(value, payload) for value in tree], "tuple": isinstance(tree, tuple)}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    raise TypeError(f"a {type(tree).__name__} cannot travel to or from the parameter server")


def unpack_tree(description: Any, payload: Any) -> Any:
    """Inverse of :func:`pack_tree`. Raises ProtocolError where description and payload do not fit."""
    if "dtype" in description:
        return _tensor(description, memoryview(payload))
    if "items" in description:
        return {key: unpack_tree(value, payload) for key, value in description["items"]}
    if "list" in description:
        values = [unpack_tree(value, payload) for value in description["list"]]
        return tuple(values) if description["tuple"] else values
    return description["value"]


def _tensor(description: Any, payload: memoryview) -> Tensor:
    dtype, shape = DTYPES.get(description["dtype"]), description["shape"]
    start, end = description["start"], description["end"]
    if dtype is None or not 0 <= start <= end <= len(payload) or end - start != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"tensor {description} does not fit a payload of {len(payload)} bytes")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(payload[start:end]), dtype=dtype).view(shape)
