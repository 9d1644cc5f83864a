"""The seam: gradients travel to the owners of their slices, new parameters to everybody."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..algorithms.algorithm import Algorithm
from ..timeline import Timeline
from .layout import ShardPlan


class Transport(ABC):
    """Its methods are called on all ranks in the same order.

    Attributes:
        reduce_scatter: Makes this rank's slice of a bucket the sum over ranks; the other slices are unspecified
            afterwards. Its buckets are laid out like ``plans``.
        values: Per bucket memory for the parameters, of the bucket's shape, zeros at first.
    """

    name: str
    reduce_scatter: Algorithm
    values: list[Tensor]

    def __init__(self, plans: Sequence[ShardPlan], rank: int, world_size: int, timeline: Timeline) -> None:
        self.plans = plans
        self.rank, self.world_size = rank, world_size
        self._timeline = timeline

    @abstractmethod
    def begin_step(self) -> None:
        """From now until :meth:`end_step` returns this rank reads only its own slices of ``values``.

        Blocks until all ranks are in the step if they have ``values`` in common.
        """

    @abstractmethod
    def publish(self, index: int) -> None:
        """This rank's slice of ``values[index]`` is stepped: give it to all. May block until they are in the step."""

    @abstractmethod
    def end_step(self) -> None:
        """Block until all slices that were published are here."""

    def num_bytes(self, index: int) -> int:
        """Sent plus received by this rank for one bucket, one way: reduce-scatter or all-gather."""
        return one_way_bytes(self.plans[index], self.rank)

    @contextmanager
    def _waiting(self, name: str, num_bytes: int = 0, **args: Any) -> Iterator[None]:
        """Communication for which training waits, within the optimizer's step; ``name``, ``args``: for traces."""
        start_ns = time.perf_counter_ns()
        with self._timeline.tracer.range(name, **args):
            yield
        end_ns = time.perf_counter_ns()
        self._timeline.add_span(start_ns, end_ns, num_bytes, name, **args)
        self._timeline.waited_in_optimizer_step(start_ns, end_ns)


def one_way_bytes(plan: ShardPlan, rank: int) -> int:
    """The own slice with every other rank, theirs with this one: (n-1)/n of the data each way if slices are even."""
    return plan.num_bytes + (len(plan.slices) - 2) * plan.bytes_of(rank)
