"""What communication cost, per optimizer step and rank, without synchronizing any device.

A strategy writes to its :class:`Timeline` while a step runs; a callback takes the finished step from it.
Any strategy that has an attribute ``timeline`` with ``take_step()`` is measured like the built-in ones.

Definitions (the same for every strategy):

* *total*: length of the union of the communication spans. Spans overlap, so they are never added up.
* *exposed*: what training waited for, from the moment the last local gradient was ready to the end of
  gradient synchronization, less the optimizer time that a server spent in between.
* *overlapped*: total - exposed.
* *exposed in the optimizer's step*: the part of exposed that lies there, where ranks exchange parameters.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, final

from .tracer import COMMUNICATION, Tracer

_NS_PER_MS = 1e6


@dataclass(frozen=True)
class StepCommunication:
    """Communication of one optimizer step on one rank. Times in milliseconds, sizes in bytes."""

    total_ms: float
    exposed_ms: float
    num_bytes: int
    """Bytes this rank handed to and took from the transport for the step, sent plus received."""
    push_ms: float | None = None
    pull_ms: float | None = None
    wait_ms: float | None = None
    server_optimizer_ms: float | None = None
    """Optimizer time on the server inside this step: it is not communication."""
    staleness: float | None = None
    """Steps that others took since this rank got the parameters its gradient is for, where that can be."""
    exposed_in_optimizer_ms: float = 0.0
    """The part of ``exposed_ms`` for which the optimizer's step on this rank waited, beside its own work."""
    total_is_upper_bound: bool = False
    """True where only the first start and the last end are known, so gaps count as communication."""

    @property
    def overlapped_ms(self) -> float:
        return max(0.0, self.total_ms - self.exposed_ms)


class TimelineLike(Protocol):
    """What callbacks ask of ``strategy.timeline``.

    If it has an attribute ``tracer`` as well (a :class:`.Tracer`), named spans are recorded through that.
    """

    def take_step(self) -> StepCommunication | None:
        """Return what was recorded since the last call and forget it; None if nothing was."""
        ...


def union_ms(spans: Iterable[tuple[int, int]]) -> float:
    """Length in ms of the union of ``(start_ns, end_ns)`` intervals."""
    covered = 0
    reached: int | None = None
    for start, end in sorted(spans):
        begin = start if reached is None else max(start, reached)
        if end > begin:
            covered += end - begin
            reached = end
    return covered / _NS_PER_MS


_MAX_SPANS = 2**14
"""Far more than a step has. A loop that never takes a step must not fill the memory with them."""


@final
class Timeline:
    """Collects the spans of the current step. Spans may be added from any thread; the rest from the trainer's.

    Attributes:
        tracer: Gets every span with its name, for whoever records them.
    """

    def __init__(self) -> None:
        self.tracer = Tracer()
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._spans: deque[tuple[int, int]] = deque(maxlen=_MAX_SPANS)
        self._exposed_ns = 0
        self._in_optimizer_ns = 0
        self._ready_ns: int | None = None
        self._num_bytes = 0
        self._parts: dict[str, float] = {}

    def add_span(
        self, start_ns: int, end_ns: int, num_bytes: int = 0, name: str = "communication", **args: Any
    ) -> None:
        """Record one communication (``time.perf_counter_ns`` stamps) and the bytes it moved on this rank.

        ``name`` and ``args`` (JSON-compatible; ``bucket`` becomes part of the name) are what a trace shows.
        """
        with self._lock:
            self._spans.append((start_ns, end_ns))
            self._num_bytes += num_bytes
        if self.tracer.recorder is not None:
            self.tracer.add(name, COMMUNICATION, start_ns, end_ns, bytes=num_bytes, **args)

    def gradients_ready(self) -> None:
        """The last local gradient of a backward pass is ready: from here on training waits."""
        self._ready_ns = time.perf_counter_ns()

    def synchronized(self) -> None:
        """Gradients (or parameters) agree: training goes on. Adds the time since :meth:`gradients_ready`."""
        if self._ready_ns is not None:
            self._exposed_ns += time.perf_counter_ns() - self._ready_ns
            self._ready_ns = None

    def waited_in_optimizer_step(self, start_ns: int, end_ns: int) -> None:
        """The optimizer's step waited for communication in between: exposed, but no part of the backward pass."""
        self._exposed_ns += end_ns - start_ns
        self._in_optimizer_ns += end_ns - start_ns

    def add_parts(self, **parts: float) -> None:
        """Add to the named parts of the step: those of :class:`StepCommunication` that may be None."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value

    def take_step(self) -> StepCommunication | None:
        with self._lock:
            if not self._spans and not self._exposed_ns:
                return None
            exposed_ms = self._exposed_ns / _NS_PER_MS - self._parts.get("server_optimizer_ms", 0.0)
            total_ms = union_ms(self._spans) - self._parts.get("server_optimizer_ms", 0.0)
            step = StepCommunication(
                max(0.0, total_ms),
                max(0.0, exposed_ms),
                self._num_bytes,
                push_ms=self._parts.get("push_ms"),
                pull_ms=self._parts.get("pull_ms"),
                wait_ms=self._parts.get("wait_ms"),
                server_optimizer_ms=self._parts.get("server_optimizer_ms"),
                staleness=self._parts.get("staleness"),
                exposed_in_optimizer_ms=self._in_optimizer_ns / _NS_PER_MS,
            )
            self._reset()
            return step
