"""What a server counts while it serves. Counting costs an addition or a look at the clock; means are made on demand."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import final

_LAGGING_S = 5.0
_LAGGING_INTERVALS = 3.0


@final
@dataclass(frozen=True)
class WorkerFigures:
    """One worker, since the fit began. A push is one worker's gradients for one step of one optimizer."""

    worker: int
    pushes: int
    """Applied ones: the worker's clock."""
    behind: int
    """How many fewer pushes than the fastest worker's."""
    last_seen_s: float
    """Seconds since its last message."""
    wait_ms: float
    """Mean time from a push's announcement until the server had answered it."""
    staleness: float
    """Mean number of steps by others that came between its parameters and its gradients."""


@final
@dataclass(frozen=True)
class Interval:
    """What the server did between two calls of :meth:`ServerStatistics.take`."""

    total_steps: int
    """Since the fit began."""
    num_steps: int
    num_pushes: int
    elapsed_s: float
    received_bytes: int
    """Of gradients."""
    sent_bytes: int
    """Of parameters, those included that were asked for between two steps (validation, checkpoints)."""
    queue_pushes: float
    """Pushes announced and not answered yet, mean over time: the number of workers that wait."""
    receive_ms: float
    """This and the following are per step. They may overlap: do not add them up."""
    reduce_ms: float
    optimizer_ms: float
    send_ms: float
    """Handing replies to the socket, or copying them to shared memory."""
    staleness: Counter[int]
    """How many pushes were overtaken by so many steps of others."""

    @property
    def pushes_per_s(self) -> float:
        return self.num_pushes / self.elapsed_s

    @property
    def mean_staleness(self) -> float:
        return sum(steps * count for steps, count in self.staleness.items()) / max(1, self.num_pushes)

    @property
    def max_staleness(self) -> int:
        return max(self.staleness, default=0)


@final
class ServerStatistics:
    """Counts for one fit. Written by the server's thread alone; others read what :meth:`take` returns.

    Attributes:
        received_bytes: Bytes of gradients since :meth:`take`; the server adds to it, as to ``sent_bytes`` (of
            parameters) and ``send_ns``.
        seen_ns: Per worker, ``perf_counter_ns`` of its last message; the server sets it.
        left: Workers that have said bye.
        total_steps: Steps since the fit began.
    """

    def __init__(self, num_workers: int) -> None:
        self.received_bytes = self.sent_bytes = self.send_ns = 0
        self.seen_ns: dict[int, int] = {}
        self.left: set[int] = set()
        self.total_steps = 0
        self._pushes = dict.fromkeys(range(num_workers), 0)
        self._answer_ns = dict.fromkeys(range(num_workers), 0)
        self._stale_steps = dict.fromkeys(range(num_workers), 0)
        self._began_ns = self._since_ns = 0
        self._restart()

    def _restart(self) -> None:
        self.received_bytes = self.sent_bytes = self.send_ns = 0
        self.num_steps = 0
        self._waited_ns = 0
        self._times_ms = dict.fromkeys(("receive_ms", "reduce_ms", "optimizer_ms"), 0.0)
        self._staleness: Counter[int] = Counter()

    # -- called by the server --------------------------------------------------------------------------------

    def applied(self, worker: int, staleness: int = 0) -> None:
        """A push of ``worker`` is in the parameters, ``staleness`` steps after those it was computed with."""
        self._pushes[worker] += 1
        self._stale_steps[worker] += staleness
        self._staleness[staleness] += 1

    def answered(self, worker: int, announced_ns: int) -> None:
        """The push that ``worker`` announced then has got its reply."""
        waited_ns = time.perf_counter_ns() - announced_ns
        self._answer_ns[worker] += waited_ns
        self._waited_ns += waited_ns
        if self.total_steps == 0:  # rates count from the first announcement: before it the server has nothing to do
            self._began_ns = self._since_ns = min(self._since_ns or announced_ns, announced_ns)

    def count_step(self, times_ms: dict[str, float]) -> None:
        """A step was taken. ``times_ms``: ``receive_ms``, ``reduce_ms``, ``optimizer_ms``."""
        self.num_steps += 1
        self.total_steps += 1
        for name in self._times_ms:
            self._times_ms[name] += times_ms[name]

    # -- called by whoever tells ------------------------------------------------------------------------------

    def take(self) -> Interval:
        """What was counted since the last call; starts a new interval."""
        now_ns, steps = time.perf_counter_ns(), max(1, self.num_steps)
        elapsed_ns = max(1, now_ns - self._since_ns)
        interval = Interval(
            total_steps=self.total_steps,
            num_steps=self.num_steps,
            num_pushes=self._staleness.total(),
            elapsed_s=elapsed_ns / 1e9,
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
            queue_pushes=self._waited_ns / elapsed_ns,  # Little's law
            send_ms=self.send_ns / 1e6 / steps,
            staleness=self._staleness,
            **{name: total / steps for name, total in self._times_ms.items()},
        )
        self._since_ns = now_ns
        self._restart()
        return interval

    def workers(self) -> list[WorkerFigures]:
        """All workers that have ever been heard of, by rank."""
        fastest, now_ns = max(self._pushes.values()), time.perf_counter_ns()
        return [
            WorkerFigures(
                worker,
                pushes,
                fastest - pushes,
                (now_ns - self.seen_ns[worker]) / 1e9,
                self._answer_ns[worker] / 1e6 / max(1, pushes),
                self._stale_steps[worker] / max(1, pushes),
            )
            for worker, pushes in self._pushes.items()
            if worker in self.seen_ns
        ]

    def lagging(self) -> list[WorkerFigures]:
        """Workers in the run that have been silent for 5 s and for three times as long as a push takes them."""
        elapsed_s = (time.perf_counter_ns() - self._began_ns) / 1e9
        return [
            figures
            for figures in self.workers()
            if figures.worker not in self.left
            and figures.last_seen_s > max(_LAGGING_S, _LAGGING_INTERVALS * elapsed_s / max(1, figures.pushes))
        ]
