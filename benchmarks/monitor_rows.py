"""What `monitor.py` trains: the loop of `step.py` with all that `gradsync fit` watches it by, or nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, final

from harness import Process
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from training_rows import ROWS, LightningLoop, Observe, StepClock, Workload

from gradsync.callbacks import (
    CommunicationMonitor,
    Dashboard,
    DDPTimeline,
    EvenBatches,
    LineProgress,
    NonfiniteGuard,
    ResultsWriter,
    RunSummary,
    StopOnSignal,
    TraceWriter,
)
from gradsync.callbacks.span_file import SpanFile
from gradsync.callbacks.step_timer import StepTimer
from gradsync.comm import Timeline

STRATEGIES = ("ddp", "manual_allreduce", "sharded_server", "parameter_server")
_ALWAYS_ON = {
    StepTimer: ("enter",),
    DDPTimeline: ("take_step",),
    SpanFile: ("add", "flush"),
    Timeline: ("add_span", "gradients_ready", "synchronized", "waited_in_optimizer_step", "add_parts", "take_step"),
}
"""What runs outside of callbacks' hooks, with or without callbacks."""


@final
class OwnTime:
    """Adds up the time spent within wrapped functions; one that is called by another is not counted twice."""

    def __init__(self) -> None:
        self._spent_ns = 0
        self._inside = False

    def spent_ms(self) -> float:
        return self._spent_ns / 1e6

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start_ns = True, time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent_ns += time.perf_counter_ns() - start_ns
                self._inside = False

        return timed

    def watch_callback(self, callback: Callback) -> None:
        """All hooks that its class implements, and what it hands to others."""
        hooks = [name for name in dir(Callback) if getattr(type(callback), name) is not getattr(Callback, name, None)]
        for name in (*hooks, "_on_optimizer_stepped"):
            if name.startswith(("on_", "_on_")) and hasattr(callback, name):
                setattr(callback, name, self.wrap(getattr(callback, name)))

    def watch_classes(self) -> None:
        """The functions of :data:`_ALWAYS_ON`, in this process from now on."""
        for cls, names in _ALWAYS_ON.items():
            for name in names:
                setattr(cls, name, self.wrap(getattr(cls, name)))


def _traced(process: Process, workload: Workload, clock: StepClock) -> dict[str, Any]:
    """The same, and every step is recorded for a trace."""
    return _observed(process, workload, clock, TraceWriter(f"2-{workload.total_steps}", process.folder))


def _observed(process: Process, workload: Workload, clock: StepClock, *more: Callback) -> dict[str, Any]:
    """As `gradsync fit` does it."""
    folder = process.folder
    callbacks = [
        CommunicationMonitor(workload.warmup),
        LineProgress(1),
        ResultsWriter(folder),
        Dashboard(),
        RunSummary(),
        *more,
    ]
    own = _measure(callbacks, clock)
    own.watch_classes()
    return {
        "callbacks": callbacks,
        "logger": TensorBoardLogger(folder, name=None, version="run"),
        "enable_progress_bar": True,
    }


def _guarded(process: Process, workload: Workload, clock: StepClock) -> dict[str, Any]:
    """What `gradsync fit` does against faults alone: signals, and every gradient looked at."""
    callbacks = [EvenBatches(), StopOnSignal(), NonfiniteGuard("skip")]
    _measure(callbacks, clock)
    return {"callbacks": callbacks}


def _measure(callbacks: list[Callback], clock: StepClock) -> OwnTime:
    own = OwnTime()
    for callback in callbacks:
        own.watch_callback(callback)
    clock.also = lambda: {"observing_ms": own.spent_ms()}
    return own


def rows() -> dict[str, LightningLoop]:
    """Every strategy: observed, traced as well, guarded, and nothing of it."""
    made = {}
    for name in STRATEGIES:
        made[name] = _with(name, _observed)
        made[f"{name}_traced"] = _with(name, _traced)
        made[f"{name}_guarded"] = _with(name, _guarded)
        made[f"{name}_unobserved"] = _with(name, lambda process, workload, clock: {"callbacks": []})
    return made


def _with(name: str, observe: Observe) -> LightningLoop:
    row = ROWS[name]
    assert isinstance(row, LightningLoop)
    return row.observed_by(observe)
