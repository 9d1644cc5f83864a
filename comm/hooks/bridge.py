"""Both ways between our engine and PyTorch's DDP communication hooks, ``hook(state, bucket) -> Future[Tensor]``.

A hook gets the local gradients of a bucket, not yet divided, and its future holds their average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ..algorithms.algorithm import Algorithm, BlockingAlgorithm
from ..buckets import Bucket, BufferSpec
from .state import HookState

Hook = Callable[[Any, Any], "Future[Tensor]"]


class BadHook(ValueError):
    """A communication hook breaks its contract, or cannot work here."""


@final
class HookBucket:
    """A bucket as hooks know it: :class:`torch.distributed.GradBucket`'s methods, for one call.

    ``set_buffer`` replaces the buffer for the rest of the call, also by one of another dtype.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._buffer = bucket.buffer()

    def index(self) -> int:
        return self._bucket.index()

    def is_last(self) -> bool:
        return self._bucket.is_last()

    def buffer(self) -> Tensor:
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def parameters(self) -> list[Tensor]:
        return self._bucket.parameters()

    def gradients(self) -> list[Tensor]:
        """Views of the buffer as it is now, contiguous, in the parameters' shapes."""
        parameters = self.parameters()
        parts = self._buffer.split([p.numel() for p in parameters])
        return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


@final
class HookAlgorithm(BlockingAlgorithm):
    """Averages buckets by a hook written for DDP, one bucket after the other.

    A hook's callbacks may start further collectives (PowerSGD's do). Under DDP on gloo their order depends on which
    of two buckets is through first, and ranks may disagree; here a hook is called when the one before has ended.

    Args:
        group: The one that the hook communicates over.
        hook: Takes ``(state, bucket)``; is called in a thread of the engine if tensors are on the CPU.
        state: What it takes.

    Raises:
        BadHook: (the futures) the hook returns something else than a future of a tensor of the bucket's shape.
    """

    def __init__(self, group: dist.ProcessGroup, hook: Hook, state: Any) -> None:
        super().__init__(group)
        self.scale = 1.0
        self._hook = hook
        self._state = HookState(hook, state)
        self._num_bytes: dict[int, int] = {}
        self._name = getattr(hook, "__qualname__", repr(hook))

    @override
    def reduce(self, bucket: Bucket) -> None:
        bucket.take(self._checked(self._hook(self._state.given, HookBucket(bucket)), bucket.buffer()))
        self._num_bytes[bucket.index()] = self._state.num_bytes(bucket, self.world_size)

    def _checked(self, result: Any, buffer: Tensor) -> Tensor:
        if not isinstance(result, torch._C.Future):  # what `then` returns; torch.futures.Future is its subclass
            raise BadHook(
                f"communication hook {self._name} must return a torch.futures.Future, got {type(result).__name__}"
            )
        value: Any = result.wait()
        value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        if not isinstance(value, Tensor) or value.shape != buffer.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise BadHook(
                f"communication hook {self._name} must give a tensor of shape {tuple(buffer.shape)}, got {got}"
            )
        return value

    @override
    def num_bytes(self, bucket: Bucket) -> int:
        return self._num_bytes[bucket.index()]

    @property
    def is_saved(self) -> bool:
        """Whether :meth:`state_dict` holds all of the hook's state."""
        return self._state.is_saved

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state.load_state_dict(state)


def as_ddp_hook(algorithm: Algorithm) -> Callable[[Any, dist.GradBucket], Future[Tensor]]:
    """``algorithm`` for plain DistributedDataParallel: ``model.register_comm_hook(None, as_ddp_hook(algorithm))``.

    Called on all ranks. Whoever made the algorithm closes it when training is over.
    """
    staging: dict[int, Bucket] = {}

    def stage(bucket: dist.GradBucket) -> Bucket:
        """Our bucket for DDP's, which lays out anew after the first step."""
        parameters, buffer, index = bucket.parameters(), bucket.buffer(), bucket.index()
        old = staging.get(index)
        if old is None or [id(p) for p in old.parameters()] != [id(p) for p in parameters]:
            if old is not None:
                algorithm.release([old.buffer()])
            memory = algorithm.allocate([BufferSpec(buffer.numel(), buffer.dtype, buffer.device)])[0]
            staging[index] = Bucket(index, parameters, bucket.is_last(), memory)
        torch.mul(buffer, algorithm.scale, out=staging[index].buffer())
        return staging[index]

    def gradsync_hook(state: Any, bucket: dist.GradBucket) -> Future[Tensor]:
        with torch.no_grad():
            return algorithm.start(stage(bucket)).then(_at_start_of_storage)

    gradsync_hook.__annotations__ = {"bucket": dist.GradBucket, "return": Future[Tensor]}  # DDP compares objects
    return gradsync_hook


def _at_start_of_storage(done: Future[Tensor]) -> Tensor:
    """The result, where DDP looks for it: torch 2.14 ignores the offset of a hook's result in its storage."""
    result = done.value()
    return torch.from_dlpack(result) if result.storage_offset() else result
