"""Tensors and trees of them as bytes, and back: nothing is ever unpickled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class MalformedTree(ValueError):
    """A description does not fit its payload."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    # numpy has no bfloat16: look at the bytes
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_from(payload: Any, dtype: torch.dtype) -> Tensor:
    """A 1-D tensor over ``payload``'s memory, without a copy; the caller only reads it."""
    return torch.frombuffer(payload, dtype=dtype)


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
    raise TypeError(f"a {type(tree).__name__} cannot travel between processes")


def unpack_tree(description: Any, payload: Any) -> Any:
    """Inverse of :func:`pack_tree`. Raises MalformedTree where description and payload do not fit."""
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
        raise MalformedTree(f"tensor {description} does not fit a payload of {len(payload)} bytes")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(payload[start:end]), dtype=dtype).view(shape)
