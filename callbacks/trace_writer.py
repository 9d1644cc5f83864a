"""Records what every process does in some steps, for a timeline of all of them in one Chrome trace."""

from __future__ import annotations

import itertools
import shutil
import socket
import time
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from ..comm.clock import SAME_CLOCK, ClockOffset, align_clocks
from ..comm.tracer import Tracer
from ..errors import UserError
from ..report.trace_file import FOLDER, VIEWER, merge_trace, process_file, read_process
from .communication_monitor import CommunicationMonitor, monitor_of
from .run_environment import num_servers
from .span_file import SpanFile
from .step_breakdown import StepBreakdown

_PATIENCE_S = 10.0
"""How long the first process waits at the end for files that others have still to close."""


@final
class TraceWriter(Callback):
    """Runs on all processes, servers included; each writes a file of its own, and the first one merges them at the end.

    Nothing here communicates in a step. Before the first recorded one, ranks in lockstep tell each other which clock
    they have, and on several hosts measure by how much it differs. Needs a :class:`CommunicationMonitor` before it.

    A run that ends with an error, or is killed, leaves the processes' files: see :mod:`gradsync.report.trace_file`.

    Args:
        steps: Optimizer steps of the fit, counted from 1: ``"10-12"``, or ``"10"``.
        dirpath: Folder for the trace; by default the Trainer's ``default_root_dir``.
    """

    def __init__(self, steps: str = "10-12", dirpath: str | Path | None = None) -> None:
        self.first_step, self.last_step = _parse(steps)
        self.dirpath = dirpath
        self.path: Path | None = None
        """The trace, in the process that has written it."""
        self._file: SpanFile | None = None
        self._monitor: CommunicationMonitor | None = None
        self._tracer: Tracer | None = None

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises: ValueError without a CommunicationMonitor."""
        if stage != "fit":
            return
        self._monitor = monitor_of(trainer)
        if self._monitor is None:
            raise ValueError(
                "TraceWriter needs a CommunicationMonitor for the phases of a step, got none: "
                "add gradsync.callbacks.CommunicationMonitor to --trainer.callbacks, before the TraceWriter"
            )
        self.path, self._recording, self._num_steps = None, False, 0
        self._seen: StepBreakdown | None = None
        folder = Path(self.dirpath or trainer.default_root_dir).resolve() / FOLDER
        self._open_file(trainer, folder)

    def _open_file(self, trainer: pl.Trainer, folder: Path) -> None:
        strategy = trainer.strategy
        tracer: Tracer | None = getattr(getattr(strategy, "timeline", None), "tracer", None)
        servers, rank, is_server = num_servers(strategy), trainer.global_rank, getattr(strategy, "is_server", False)
        number = getattr(strategy, "process_rank", rank)
        name = f"server {number}" if is_server else f"rank {rank}"
        self._num_processes = servers + trainer.world_size
        self._merges = number == 0
        facts = {"name": name, "is_server": is_server, "host": socket.gethostname()}
        self._file = SpanFile(number, facts)
        if is_server:
            assert tracer is not None
            tracer.on_request = self._file  # its strategy opens it, when it knows where the workers write
            return
        agreed = strategy.broadcast(str(folder))
        self._file.open(agreed)
        if tracer is not None:
            tracer.folder = agreed

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._monitor is not None
        self._tracer = getattr(self._monitor.timeline, "tracer", None)
        self._switch(trainer)

    def _switch(self, trainer: pl.Trainer) -> None:
        """Between two steps: begin to record, or end."""
        if self._num_steps + 1 == self.first_step:
            self._start(trainer)
        elif self._num_steps == self.last_step:
            self._stop()

    def _start(self, trainer: pl.Trainer) -> None:
        assert self._file is not None
        assert self._monitor is not None
        clock = _align(trainer)
        self._file.tell(offset_ns=clock.offset_ns, accuracy_ns=clock.accuracy_ns)
        self._recording = True
        self._begin_ns = self._end_ns = 0
        self._monitor.watch_phases(self._on_phase)
        if self._tracer is not None:
            self._tracer.recorder = self._file

    def _stop(self) -> None:
        """Whatever ends the recording: its last step, the fit, or an error."""
        if self._recording and self._monitor is not None:
            self._monitor.watch_phases(None)
            if self._tracer is not None:
                self._tracer.recorder = None
        self._recording = False
        if self._file is not None:
            self._file.close()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        file, self._file = self._file, None
        if stage != "fit" or file is None:
            return
        file.close()
        if self._merges and file.path is not None:
            self._merge(file.path.parent)

    def _merge(self, folder: Path) -> None:
        """Wait for the other processes' last lines, and tell the user."""
        missing = _await_files(folder, self._num_processes)
        self.path = merge_trace(folder.parent)
        steps = f"steps {self.first_step} to {self.last_step}"
        if self.path is None:
            print(f"trace: the fit ended before {steps}", flush=True)
        elif missing:
            print(f"trace of {steps}, without process(es) {missing}: {self.path} (open it in {VIEWER})", flush=True)
        else:
            print(f"trace of {steps}: {self.path} (open it in {VIEWER})", flush=True)
            shutil.rmtree(folder)

    # -- phases of a step ------------------------------------------------------------------------------------

    def _on_phase(self, phase: str, start_ns: int, end_ns: int) -> None:
        self._begin_ns, self._end_ns = self._begin_ns or start_ns, end_ns
        self._add(phase, start_ns, end_ns)

    def _add(self, name: str, start_ns: int, end_ns: int, category: str = "phase", **args: Any) -> None:
        if self._recording and self._file is not None:
            self._file.add(name, category, start_ns, end_ns, args)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._forward_ns = time.perf_counter_ns()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._backward_ns = time.perf_counter_ns()
        self._add("forward", self._forward_ns, self._backward_ns)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forward_ns = time.perf_counter_ns()  # of a second pass in the same batch
        self._add("backward", self._backward_ns, self._forward_ns)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._monitor is not None
        step = self._monitor.last_step
        if step is None or step is self._seen:
            return
        self._seen = step
        self._num_steps += 1
        if self._recording and self._file is not None:
            args = {"step": self._num_steps, **step.metrics()}
            self._add(f"step {self._num_steps}", self._begin_ns, self._end_ns, "step", **args)
            self._begin_ns = 0
            self._file.flush()
        self._switch(trainer)


def _parse(steps: str) -> tuple[int, int]:
    """First and last step; raises ValueError."""
    first, _, last = str(steps).partition("-")
    last = last or first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--trace_steps must be a range of steps from 1 on, such as 10-12, got {steps!r}")
    return int(first), int(last)


def _align(trainer: pl.Trainer) -> ClockOffset:
    """Ranks in lockstep may wait for each other here; others are on one host, so far."""
    if not dist.is_initialized() or trainer.world_size == 1:
        return SAME_CLOCK
    store = dist.PrefixStore(f"gradsync trace {next(_num_alignments)}", dist.distributed_c10d._get_default_store())
    return align_clocks(store, trainer.global_rank, trainer.world_size)


_num_alignments = itertools.count()
"""Every rank records the same fits, so the counts agree."""


def _await_files(folder: Path, num_processes: int) -> str:
    """Those that have not come in time."""
    waiting, deadline = set(range(num_processes)), time.monotonic() + _PATIENCE_S
    while waiting and time.monotonic() < deadline:
        waiting = {number for number in waiting if not _is_complete(process_file(folder, number))}
        time.sleep(0.02 if waiting else 0.0)
    return ", ".join(map(str, sorted(waiting)))


def _is_complete(path: Path) -> bool:
    return path.exists() and bool(read_process(path).facts.get("complete"))
