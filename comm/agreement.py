"""What ranks tell each other before the first step: byte strings over a group, and whether their models agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .packing import pack_tree, unpack_tree


class ModelMismatch(ValueError):
    """The ranks of a run hold different models."""


def _device(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _padded(data: bytes, num_bytes: int, device: torch.device) -> Tensor:
    """Collectives want the same size on all ranks, and more than nothing."""
    return torch.frombuffer(bytearray(data.ljust(max(1, num_bytes), b"\0")), dtype=torch.uint8).to(device)


def all_gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Every rank's ``data``, in rank order. Blocks; called on all ranks of ``group``. Nothing is unpickled."""
    device = _device(group)
    world_size = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    padded = _padded(data, max(int(size) for size in sizes), device)
    rows = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(rows, padded, group=group)
    return [row[: int(size)].cpu().numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather_trees(tree: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """On rank 0 every rank's ``tree`` (see :func:`.pack_tree`), in rank order; an empty list on the others. Blocks."""
    description, payload = pack_tree(tree)
    mine = json.dumps([description, len(payload)]).encode()
    descriptions = [json.loads(data) for data in all_gather_bytes(mine, group)]
    padded = _padded(payload, max(size for _, size in descriptions), _device(group))
    is_first = dist.get_rank(group) == 0
    rows = [torch.empty_like(padded) for _ in descriptions] if is_first else None
    dist.gather(padded, rows, group=group, group_dst=0)
    return [
        unpack_tree(description, row.cpu().numpy()[:size])
        for (description, size), row in zip(descriptions, rows or [], strict=False)
    ]


def check_same_model(
    named_tensors: Iterable[tuple[str, Tensor]], gather: Callable[[bytes], list[bytes]] = all_gather_bytes
) -> None:
    """Block until all ranks have compared their tensors' names, shapes and dtypes, in order.

    Args:
        gather: Gives every rank's bytes in rank order.

    Raises:
        ModelMismatch: on every rank alike, naming the first tensor that differs from rank 0's.
    """
    table = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in named_tensors]
    text = json.dumps(table).encode()
    if len(set(gather(hashlib.sha256(text).digest()))) == 1:
        return
    tables = [json.loads(data) for data in gather(text)]
    rank = next(rank for rank, other in enumerate(tables) if other != tables[0])
    raise ModelMismatch(f"ranks hold different models: {_first_difference(tables[0], tables[rank], rank)}")


def _first_difference(first: list[Any], other: list[Any], rank: int) -> str:
    for mine, theirs in zip(first, other, strict=False):
        if mine != theirs:
            return f"rank 0 has {_tensor_text(mine)} where rank {rank} has {_tensor_text(theirs)}"
    longer = max(first, other, key=len)
    extra = longer[min(len(first), len(other))]
    return f"only rank {0 if longer is first else rank} has {_tensor_text(extra)} (compared with rank {rank})"


def _tensor_text(row: list[Any]) -> str:
    name, shape, dtype = row
    return f"{name!r} ({dtype.removeprefix('torch.')}, shape {'x'.join(map(str, shape)) or 'scalar'})"
