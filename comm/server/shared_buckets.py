"""Buckets in memory that the server and the workers of one host map: messages then carry no tensor bytes.

Every worker writes its gradients to buffers of its own, the server its parameters to its own; each only reads the
other's. A message says what may be read, and the phases of a step say when it may be overwritten.
"""

from __future__ import annotations

import itertools
from typing import Any, final

from torch import Tensor

from ..buckets import BufferSpec
from ..shared_memory import Segment

_ALIGNMENT = 64


@final
class SharedBuffers:
    """The buffers of one layout's buckets in one segment, zeros at first.

    Args:
        num_makers: So many processes of this host make as much memory at the same time.

    Raises:
        SharedMemoryError: there is too little memory.
    """

    def __init__(self, num_makers: int) -> None:
        self._num_makers = num_makers
        self._segment: Segment | None = None

    def allocate(self, specs: list[BufferSpec]) -> list[Tensor]:
        self._segment = Segment.create(
            sum(_sizes(specs)), self._num_makers, "--trainer.strategy.transport ipc needs none"
        )
        return _buffers(self._segment, specs)

    def handle(self) -> dict[str, Any]:
        """For :func:`attach` in another process; JSON-compatible."""
        assert self._segment is not None
        return self._segment.handle()

    def seal(self) -> None:
        """Nobody attaches from now on."""
        assert self._segment is not None
        self._segment.seal()


def attach(handle: dict[str, Any], specs: list[BufferSpec]) -> list[Tensor]:
    """The buffers of another process. Raises SharedMemoryError if they cannot be reached from here."""
    return _buffers(Segment.attach(handle), specs)


def _sizes(specs: list[BufferSpec]) -> list[int]:
    return [-(-spec.numel * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for spec in specs]


def _buffers(segment: Segment, specs: list[BufferSpec]) -> list[Tensor]:
    starts = itertools.accumulate(_sizes(specs), initial=0)
    return [segment.tensor(start, spec.numel, spec.dtype) for start, spec in zip(starts, specs, strict=False)]
