"""What one server tells people: a line on the console and a point in TensorBoard now and then, a table at the end."""

from __future__ import annotations

import sys
from typing import final

import torch.distributed as dist

from ..comm.server import Interval, ParameterServer, ServerStatistics, WorkerFigures
from .server_tensorboard import ServerTensorBoard, is_announced, table_row

_FINE_BELOW = 10.0
"""Smaller figures are shown with one decimal."""
_FIRST_ALARM_S = 5.0


@final
class ServerView:
    """Follows one fit, on the server's thread. Says nothing of an evaluation, which has no steps.

    Args:
        store: Of the run.
        number: The server's, None if it is the only one.
        every_n_steps: Steps from one line, and one point, to the next; 0 for neither, ever.
        num_workers: How many push.
        is_sync: Whether all of them take part in every step.
    """

    def __init__(
        self, store: dist.Store, number: int | None, every_n_steps: int, num_workers: int, is_sync: bool
    ) -> None:
        self._store = store
        self._number = number
        self._every = every_n_steps
        self._num_workers = num_workers
        self._is_sync = is_sync
        self._board: ServerTensorBoard | None = None
        self._unwritten: list[tuple[Interval, list[WorkerFigures]]] = []
        """Points from before the first worker began to train: in mode ``async`` others may be ahead of it."""
        self._next_alarm_s = _FIRST_ALARM_S

    @property
    def _name(self) -> str:
        return "server" if self._number is None else f"server {self._number}"

    def on_step(self, statistics: ServerStatistics) -> None:
        """After every step."""
        self._next_alarm_s = _FIRST_ALARM_S
        if self._every:
            self._open()
        if self._every and statistics.total_steps % self._every == 0:
            interval = statistics.take()
            self._say(" | ".join([_line(interval, self._is_sync), *map(_last_seen, statistics.lagging())]))
            self._write(interval, statistics.workers())

    def on_idle(self, server: ParameterServer) -> None:
        """While no message comes: say who keeps the others waiting, at 5 s and then ever more rarely."""
        if not self._every or server.statistics.total_steps == 0:
            return
        late, waited_s = server.waited_for()
        culprits = [figures for figures in server.statistics.lagging() if figures.worker in late]
        if culprits and waited_s >= self._next_alarm_s:
            self._next_alarm_s = 2 * waited_s
            who = ", ".join(_last_seen(figures) for figures in culprits)
            self._say(f"step {server.statistics.total_steps} | the others wait for {who}")

    def close(self, statistics: ServerStatistics) -> None:
        """When the fit ends, in whatever way: the rest since the last point, and the table of workers."""
        if not self._every or statistics.total_steps == 0:
            return
        interval, workers = statistics.take(), statistics.workers()
        if interval.num_steps:
            self._write(interval, workers)
        if self._board is not None:
            self._board.close()
        self._show(workers)

    def _write(self, interval: Interval, workers: list[WorkerFigures]) -> None:
        self._unwritten.append((interval, workers))
        if self._board is not None:
            for point in self._unwritten:
                self._board.write(*point)
            self._unwritten.clear()

    def _open(self) -> None:
        """As early as it can be: at the end of the run the store may have gone with the first server."""
        if self._board is None and is_announced(self._store):
            folder = self._name.replace(" ", "_")
            steps_per_worker_step = 1 if self._is_sync else self._num_workers
            self._board = ServerTensorBoard(self._store, folder, steps_per_worker_step, not self._is_sync)

    def _show(self, workers: list[WorkerFigures]) -> None:
        rows = [table_row(figures, shows_staleness=not self._is_sync) for figures in workers]
        if sys.stdout.isatty():
            _print_table(self._name, rows)
            return
        for row in rows:
            self._say(" | ".join(f"{column} {cell}" for column, cell in row.items()))

    def _say(self, text: str) -> None:
        print(f"{self._name}: {text}", flush=True)


def _line(interval: Interval, is_sync: bool) -> str:
    mb_per_s = 1e6 * interval.elapsed_s
    times_ms = {
        "receive": interval.receive_ms,
        **({"reduce": interval.reduce_ms} if is_sync else {}),
        "optimizer": interval.optimizer_ms,
        "send": interval.send_ms,
    }
    return (
        f"step {interval.total_steps} | {_short(interval.pushes_per_s)} pushes/s | "
        f"{_short(interval.received_bytes / mb_per_s)} MB/s in, {_short(interval.sent_bytes / mb_per_s)} out | "
        f"queue {interval.queue_pushes:.1f} | "
        f"{', '.join(f'{name} {_short(value)}' for name, value in times_ms.items())} ms"
        + ("" if is_sync else f" | staleness {interval.mean_staleness:.1f}, max {interval.max_staleness}")
    )


def _last_seen(figures: WorkerFigures) -> str:
    return f"worker {figures.worker}, last seen {figures.last_seen_s:.0f} s ago"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < _FINE_BELOW else f"{value:.0f}"


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
