"""Named spans: what each bucket and part did when, for trace files and profilers. Costs next to nothing when off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, final

import torch
from torch.autograd import profiler

COMMUNICATION = "communication"
"""Category of the spans whose union is the total of a step (see :mod:`.timeline`)."""
PART = "part"
"""Category of what happens within those, and of a server's work: never added up."""

_OFF = nullcontext()


class Recorder(Protocol):
    """Takes spans. ``add`` may come from any thread, the others from the one that trains or serves."""

    def add(self, name: str, category: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        """Keep one span (``time.perf_counter_ns`` stamps); must be fast."""
        ...

    def flush(self) -> None:
        """A good moment to write down what was kept."""
        ...

    def open(self, folder: str) -> None:
        """Where to write."""
        ...


@final
class Tracer:
    """Where a process's spans go: to a recorder, and as ranges to whichever profiler is active.

    Attributes:
        recorder: Takes spans while it is set; None for nobody.
        folder: Where this run's recorders write, if there are any: for a strategy to tell its servers.
        on_request: A server's recorder: spans go there while a worker is in a step that it records.
        profile: Opens a range of a profiler that is no torch profiler, by name.
        uses_nvtx: Open NVTX ranges, for Nsight Systems. Not run on a GPU yet.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.folder: str | None = None
        self.on_request: Recorder | None = None
        self.profile: Callable[[str], AbstractContextManager[Any]] | None = None
        self.uses_nvtx = False
        self._requested: set[int] = set()

    def add(self, name: str, category: str, start_ns: int, end_ns: int, **args: Any) -> None:
        """Record a span that has ended; ``args`` are JSON-compatible, and ``bucket`` becomes part of its name."""
        recorder = self.recorder
        if recorder is not None:
            recorder.add(_label(name, args), category, start_ns, end_ns, args)

    def range(self, name: str, **args: Any) -> AbstractContextManager[Any]:
        """For profilers only: what is recorded otherwise, or goes on after the block."""
        if self.profile is None and not self.uses_nvtx and not profiler._is_profiler_enabled:
            return _OFF
        return self._range(name, args)

    def part(self, name: str, **args: Any) -> AbstractContextManager[Any]:
        """For profilers and the recorder: the block, which is within a span of communication or on a server."""
        if self.recorder is not None:
            return self._part(name, args)
        if self.profile is None and not self.uses_nvtx and not profiler._is_profiler_enabled:
            return _OFF
        return self._range(name, args)

    @contextmanager
    def _part(self, name: str, args: dict[str, Any]) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        with self.range(name, **args):
            yield
        self.add(name, PART, start_ns, time.perf_counter_ns(), **args)

    @contextmanager
    def _range(self, name: str, args: dict[str, Any]) -> Iterator[None]:
        with ExitStack() as stack:
            if profiler._is_profiler_enabled:  # emit_nvtx included
                stack.enter_context(profiler.record_function(f"gradsync::{_label(name, args)}"))
            elif self.uses_nvtx:
                stack.enter_context(torch.cuda.nvtx.range(f"gradsync::{_label(name, args)}"))
            if self.profile is not None:
                stack.enter_context(self.profile(name))
            yield

    def requested(self, worker: int) -> None:
        """Server: ``worker`` announces a step that it records."""
        if self.on_request is not None:
            self._requested.add(worker)
            self.recorder = self.on_request

    def answered(self, worker: int) -> None:
        """Server: that step is over for ``worker``."""
        self._requested.discard(worker)
        if self.on_request is not None and self.recorder is self.on_request and not self._requested:
            self.recorder = None
            self.on_request.flush()


def _label(name: str, args: dict[str, Any]) -> str:
    return f"{name} bucket {args['bucket']}" if "bucket" in args else name
