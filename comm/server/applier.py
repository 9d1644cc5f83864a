"""Async and bounded mode: every push is one optimizer step of its own, taken when all of it is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from typing_extensions import override

from ..buckets import Bucket
from ..packing import tensor_from
from .protocol import ProtocolError
from .served import ServedOptimizer


@dataclass
class _Push:
    """What one worker has pushed so far of a step."""

    info: dict[str, Any]
    missing: set[tuple[int, int]]
    frames: dict[tuple[int, int], Any] = field(default_factory=dict)


@final
class Applier(ServedOptimizer):
    """Holds pushes until they are applied, one after the other: nobody ever sees half a step.

    Gradients are not divided by the number of workers: each is a step by itself.
    See :class:`.ServedOptimizer` for the arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pushes: dict[int, _Push] = {}
        self.version = 0
        """Steps taken so far."""

    @override
    def begin(self, worker: int, info: Any) -> None:
        self._check_used(worker, info["used"])
        if worker in self._pushes:
            raise ProtocolError(f"worker {worker} announced a step twice")
        self._pushes[worker] = _Push(info, {(b.index(), part) for b, part in self._parts(info["used"])})

    def _parts(self, used: list[list[bool]]) -> Iterator[tuple[Bucket, int]]:
        for bucket, part, _, _ in self.layout.all_parts():
            if bucket.index() < len(used) and any(used[bucket.index()]):  # a worker may know of fewer buckets
                yield bucket, part

    @override
    def add(self, worker: int, bucket_index: int, part: int, payload: Any) -> None:
        push = self._pushes.get(worker)
        if push is None or (bucket_index, part) not in push.missing:
            raise ProtocolError(f"worker {worker} pushed bucket {bucket_index} part {part} out of turn")
        self.part(bucket_index, part, payload)
        push.frames[bucket_index, part] = payload
        push.missing.remove((bucket_index, part))

    def expects(self, worker: int) -> bool:
        """Whether a push of the worker is announced and not applied."""
        return worker in self._pushes

    def forget(self, worker: int) -> None:
        """Drop what the worker has pushed and is not applied."""
        self._pushes.pop(worker, None)

    def is_complete(self, worker: int) -> bool:
        """Whether all parts of the worker's announced push are here."""
        return not self._pushes[worker].missing

    @torch.no_grad()
    def apply(self, worker: int, lr_factor: float = 1.0) -> None:
        """Step by the worker's complete push, with its learning rates times ``lr_factor``."""
        push = self._pushes.pop(worker)
        self._take_settings([_scale_lr(group, lr_factor) for group in push.info["groups"]])
        self.reduce_ms = self.optimizer_ms = 0.0
        with self.tracer.part("reduce", worker=worker):
            for bucket in self._gradients(worker, push):
                served = self.layout.buckets[bucket.index()]
                self._set_gradients(served, bucket.views, push.info["used"][bucket.index()])
        self._step(push.info["clip"], worker=worker)
        self.version += 1

    def _gradients(self, worker: int, push: _Push) -> Iterator[Bucket]:
        """The buckets that have gradients."""
        for bucket in self.buckets_of(worker):
            if not any(push.info["used"][bucket.index()]):
                continue
            if worker in self._shared and not self.layout.is_narrowed(bucket):
                yield self._shared[worker][bucket.index()]
                continue
            for part, (start, end) in enumerate(self.layout.parts(bucket)):
                sent = tensor_from(push.frames[bucket.index(), part], self.layout.specs[bucket.index()].dtype)
                bucket.buffer()[start:end].copy_(sent)
            yield bucket


def _scale_lr(group: dict[str, Any], factor: float) -> dict[str, Any]:
    return {**group, "lr": group["lr"] * factor} if "lr" in group and factor != 1.0 else group
