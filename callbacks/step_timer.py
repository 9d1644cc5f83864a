"""Splits a training process's wall time into phases, with the host's clock only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, final

Phase = Literal["data", "compute", "optimizer", "other"]
PHASES: tuple[Phase, ...] = ("data", "compute", "optimizer", "other")

_NS_PER_MS = 1e6


@final
class StepTimer:
    """At any moment one phase runs, or none: so the phases of a step add up to its wall time by construction.

    One thread uses it. It starts paused. Nothing here waits for a device: on a GPU a phase is the time that the
    host spent in it.
    """

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._since_ns = 0
        self._spent_ns: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self.on_phase: Callable[[Phase, int, int], None] | None = None
        """Told of every stretch of a phase: its start and end in ``time.perf_counter_ns``."""

    def enter(self, phase: Phase) -> None:
        """End the running phase, if any, and start `phase`."""
        self._book()
        self._phase = phase

    def pause(self) -> None:
        """End the running phase; time counts for nobody until the next :meth:`enter`."""
        self._book()
        self._phase = None

    def take_ms(self) -> dict[Phase, float]:
        """Milliseconds per phase since the last call, or since the start. The running phase goes on."""
        self._book()
        spent_ms: dict[Phase, float] = {phase: spent / _NS_PER_MS for phase, spent in self._spent_ns.items()}
        self._spent_ns = dict.fromkeys(PHASES, 0)
        return spent_ms

    def _book(self) -> None:
        now_ns = time.perf_counter_ns()
        if self._phase is not None:
            self._spent_ns[self._phase] += now_ns - self._since_ns
            if self.on_phase is not None:
                self.on_phase(self._phase, self._since_ns, now_ns)
        self._since_ns = now_ns
