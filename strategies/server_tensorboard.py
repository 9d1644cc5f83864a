"""The TensorBoard run of one server, in a folder beside the files of the run it serves."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, final

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger

from ..comm.server import Interval, WorkerFigures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_KEY = "tensorboard"
_CHARTS = ["pushes_per_s", "queue_pushes", "step_ms", "receive_ms", "optimizer_ms", "send_ms"]
"""Two rows of TensorBoard's custom scalars, one tag per chart, in a category that only servers' runs have."""


def announce(store: dist.Store, trainer: pl.Trainer) -> None:
    """First worker, when training begins: tell the servers where the run's files are and at which step it begins.

    A server cannot tell by itself: default folders are numbered, or carry the time, and a resumed step is restored in
    the workers.
    """
    logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
    run = {"log_dir": logger.log_dir if logger is not None else None, "first_step": trainer.global_step}
    store.set(_KEY, json.dumps(run))


def is_announced(store: dist.Store) -> bool:
    """Whether the first worker has come that far. Waiting for it instead could be for ever: it may need the server."""
    return store.check([_KEY])


@final
class ServerTensorBoard:
    """Writes points; makes no folder before the first one, and none at all where the run has no TensorBoardLogger.

    Args:
        store: Of the run, in which that is announced.
        name: Of the folder.
        steps_per_worker_step: How many steps the server takes per step of a worker.
        shows_staleness: Whether gradients can be stale: in modes async and bounded.
    """

    def __init__(self, store: dist.Store, name: str, steps_per_worker_step: int, shows_staleness: bool) -> None:
        run = json.loads(store.get(_KEY))
        self._folder = os.path.join(run["log_dir"], name) if run["log_dir"] is not None else None
        self._first_step = run["first_step"] * steps_per_worker_step
        self._shows_staleness = shows_staleness
        self._writer: SummaryWriter | None = None

    def write(self, interval: Interval, workers: list[WorkerFigures]) -> None:
        """One point of every chart, and the table of workers."""
        if self._folder is None:
            return
        if self._writer is None:
            self._writer = _open(self._folder)
        step = self._first_step + interval.total_steps
        for name, value in self._scalars(interval, workers).items():
            self._writer.add_scalar(f"server/{name}", value, step)
        if self._shows_staleness:
            self._writer.add_histogram_raw("server/staleness", **_histogram(interval), global_step=step)
        self._writer.add_text("server/workers", _table(workers, self._shows_staleness), step)

    def _scalars(self, interval: Interval, workers: list[WorkerFigures]) -> dict[str, float]:
        steps = max(1, interval.num_steps)
        scalars = {
            "pushes_per_s": interval.pushes_per_s,
            "queue_pushes": interval.queue_pushes,
            "in_bytes": interval.received_bytes / steps,
            "out_bytes": interval.sent_bytes / steps,
            "step_ms": interval.elapsed_s * 1e3 / steps,
            "receive_ms": interval.receive_ms,
            "optimizer_ms": interval.optimizer_ms,
            "send_ms": interval.send_ms,
        }
        if not self._shows_staleness:
            return {**scalars, "reduce_ms": interval.reduce_ms}  # where nobody waits nothing is summed
        scalars["staleness_mean"] = interval.mean_staleness
        scalars["staleness_max"] = interval.max_staleness
        return {**scalars, "lag_pushes": max(figures.behind for figures in workers)}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open(folder: str) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # not before somebody wants it

    writer = SummaryWriter(folder)
    writer.add_custom_scalars(
        {"Server": {tag: ["Multiline", [f"^{tag}$"]] for tag in map("server/{}".format, _CHARTS)}}
    )
    return writer


def _histogram(interval: Interval) -> dict[str, Any]:
    """One bucket per number of steps, so that nothing is rounded.

    TensorBoard draws the outer buckets from ``min`` and to ``max``: half a step further out all are equally wide.
    """
    counts = [interval.staleness[steps] for steps in range(interval.max_staleness + 1)]
    return {
        "min": -0.5,
        "max": interval.max_staleness + 0.5,
        "num": sum(counts),
        "sum": sum(steps * count for steps, count in enumerate(counts)),
        "sum_squares": sum(steps**2 * count for steps, count in enumerate(counts)),
        "bucket_limits": [steps + 0.5 for steps in range(len(counts))],
        "bucket_counts": counts,
    }


def _table(workers: list[WorkerFigures], shows_staleness: bool) -> str:
    """Markdown."""
    rows = [table_row(figures, shows_staleness) for figures in workers]
    lines = [list(rows[0]), ["---:"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_row(figures: WorkerFigures, shows_staleness: bool) -> dict[str, str]:
    """Cells of a worker's row by column, for every table of workers."""
    row = {
        "worker": str(figures.worker),
        "pushes": str(figures.pushes),
        "behind": str(figures.behind),
        "last seen": f"{figures.last_seen_s:.1f} s ago",
        "wait per push": f"{figures.wait_ms:.1f} ms",
    }
    return {**row, "staleness": f"{figures.staleness:.1f}"} if shows_staleness else row
