"""How training processes agree on things that are not gradients: barriers, broadcasts, metric reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from torch import Tensor
from typing_extensions import override

from ..comm.agreement import all_gather_bytes
from ..comm.broadcast import broadcast_tensors


class ControlPlane(ABC):
    """One seam for everything Lightning asks of a strategy besides training steps."""

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Block until every training process is here."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every training process."""

    @abstractmethod
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the training processes (``"mean"``, ``"sum"`` or a ReduceOp); blocks."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Stack the tensors of all training processes: shape ``(world_size, *tensor.shape)``."""

    @abstractmethod
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every training process's ``data``, in rank order; blocks."""

    @abstractmethod
    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Give every training process rank ``src``'s values, in place; blocks."""


@final
class GroupControlPlane(ControlPlane):
    """Over torch's default process group: every training process must be alive and take part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @override
    def barrier(self, name: str | None = None) -> None:
        ids = [self._device.index] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=ids)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return _all_gather_ddp_if_available(tensor, group=group, sync_grads=sync_grads)

    @override
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        return all_gather_bytes(data)

    @override
    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        assert src == 0, "ranks in lockstep have the same right to theirs"
        broadcast_tensors(tensors)


@final
class LocalControlPlane(ControlPlane):
    """For a process that trains nothing (the parameter server, or before ranks have met): nobody to agree with."""

    @override
    def barrier(self, name: str | None = None) -> None:
        return

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    @override
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor.unsqueeze(0)

    @override
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]

    @override
    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        return
