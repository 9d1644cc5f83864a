"""A server's side of the memory that it shares with the workers of its host, where it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from ..buckets import BufferSpec
from ..packing import tensor_bytes
from .protocol import Kind, Message, ProtocolError
from .served import ServedOptimizer
from .shared_buckets import SharedBuffers, attach


@final
class WorkerMemory:
    """Where the parameters lie that workers read, and the gradients that they write.

    Args:
        num_optimizers: With a segment of parameters each.
        num_makers: How many processes of this host make as much memory.
    """

    def __init__(self, num_optimizers: int, num_makers: int) -> None:
        self._own = [SharedBuffers(num_makers) for _ in range(num_optimizers)]
        self.allocators = [buffers.allocate for buffers in self._own]
        """Make the memory of the parameters, by optimizer."""
        self._pushed: dict[int, list[list[Tensor]]] = {}
        """Per worker and optimizer, the buffers to which it writes its gradients."""

    def handles(self) -> list[dict[str, Any]]:
        """By which workers attach to the parameters; JSON-compatible."""
        return [buffers.handle() for buffers in self._own]

    def take(self, worker: int, memory: dict[str, Any], served: Sequence[ServedOptimizer]) -> None:
        """A worker tells where its memory is. Raises ProtocolError."""
        self._pushed[worker] = attach_all(memory.get("pushed", []), served)
        for optimizer, buffers in zip(served, self._pushed[worker], strict=True):
            optimizer.attach(worker, buffers)

    def take_grown(
        self, worker: int, number: int, first: int, specs: list[BufferSpec], memory: dict[str, Any], served: Any
    ) -> None:
        """The same for the buckets from ``first`` on that have joined optimizer ``number``."""
        pushed = attach_one(memory.get("pushed"), specs)
        self._pushed[worker][number] += pushed
        served.attach(worker, pushed, first)

    def payload(self, worker: int, message: Message, served: ServedOptimizer) -> Any:
        """The bytes that a message says are in the worker's memory. Raises ProtocolError."""
        layout = served.layout
        try:
            bucket = layout.buckets[message.bucket]
            start, end = layout.parts(bucket)[message.part]
        except IndexError:
            raise ProtocolError(f"worker {worker} names bucket {message.bucket} part {message.part}: no such") from None
        if message.kind == Kind.INIT and layout.is_narrowed(bucket):
            return message.payload  # unrounded values have no place in the shared memory
        return tensor_bytes(self._pushed[worker][message.optimizer][message.bucket][start:end])

    def seal(self) -> None:
        """Nobody attaches from now on."""
        for buffers in self._own:
            buffers.seal()


def attach_all(handles: Any, served: Sequence[ServedOptimizer]) -> list[list[Tensor]]:
    """A worker's buffers, per optimizer. Raises ProtocolError."""
    if not isinstance(handles, list) or len(handles) != len(served):
        raise ProtocolError(f"a worker describes memory that cannot be mapped: {handles!r}")
    return [attach_one(handle, optimizer.layout.specs) for handle, optimizer in zip(handles, served, strict=True)]


def attach_one(handle: Any, specs: list[BufferSpec]) -> list[Tensor]:
    """Those of one optimizer. Raises ProtocolError."""
    try:
        return attach(handle, specs)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a worker describes memory that cannot be mapped: {error!r}") from error
