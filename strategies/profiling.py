"""Lightning's profilers (``--trainer.profiler``), and NVTX, see what our strategies do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler, Profiler, PyTorchProfiler

if TYPE_CHECKING:
    from .collective import CollectiveStrategy


def show_in_profiler(strategy: CollectiveStrategy, trainer: pl.Trainer) -> None:
    """Called when the process and its device are known. What an earlier Trainer had set is forgotten."""
    profiler: Profiler = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue] (set by a connector)
    tracer, name = strategy.timeline.tracer, type(strategy).__name__

    def profile(action: str) -> AbstractContextManager[Any]:
        return profiler.profile(f"[Strategy]{name}.{action}")

    # torch's own profiler gets ranges from whoever is under way while it records
    silent = isinstance(profiler, (PassThroughProfiler, PyTorchProfiler))
    tracer.profile = None if silent else profile
    tracer.uses_nvtx = strategy.root_device.type == "cuda"


@contextmanager
def without_torch_profiler(trainer: pl.Trainer) -> Iterator[None]:
    """For a server: Lightning's PyTorchProfiler goes by training steps, and fails at the end where there were none."""
    profiler: Profiler = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(profiler, PyTorchProfiler):
        trainer.profiler = PassThroughProfiler()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        trainer.profiler = profiler  # pyright: ignore[reportAttributeAccessIssue]
