"""Give every rank the tensors of one rank, few messages for many tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024


def _messages(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group by dtype and device, keeping the order, at most ``_MAX_MESSAGE_BYTES`` together."""
    open_messages: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    messages: list[list[Tensor]] = []
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        message = open_messages.get(kind)
        if message is None or sum(t.nbytes for t in message) + tensor.nbytes > _MAX_MESSAGE_BYTES:
            message = open_messages[kind] = []
            messages.append(message)
        message.append(tensor)
    return messages


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None, src: int = 0) -> int:
    """Overwrite ``tensors`` in place with those of rank ``src`` of ``group`` (default: all).

    Blocks; called on all ranks of the group. Every rank passes tensors of the same shapes and dtypes in the same order.

    Returns:
        Bytes this rank sent or received.
    """
    num_bytes = 0
    for message in _messages(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in message])
        dist.broadcast(flat, group=group, group_src=src)
        num_bytes += flat.nbytes
        if dist.get_rank(group) != src:
            parts = flat.split([tensor.numel() for tensor in message])
            torch._foreach_copy_(message, [part.view(t.shape) for t, part in zip(message, parts, strict=True)])
    return num_bytes
