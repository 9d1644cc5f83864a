"""SIGTERM, Ctrl-C and SLURM's signals: a checkpoint after a step that all ranks agree on, then the end."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from ..comm.stop import StopAgreement
from ..errors import StoppedBySignal
from ..signals import SignalListener
from .run_store import run_store

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_STEPS_AHEAD = 8
"""Hosts run ahead of CUDA devices, but a launch queue holds about a thousand kernels: a few steps."""
_SAVING_TAKES = timedelta(minutes=10)


@final
class StopOnSignal(Callback):
    """In place of Lightning's SIGTERM handler, which holds a collective and hangs when ranks hear it at other moments.

    Works under every strategy. Whichever process hears the signal, all training ranks stop after the same step (in the
    parameter server's async mode each after its own); ``last.ckpt`` is saved where a ``ModelCheckpoint`` saves. A
    second signal ends its process at once.

    Raises:
        StoppedBySignal: from ``fit``, on every rank.
    """

    def __init__(self) -> None:
        self._listener: SignalListener | None = None
        self._agreement: StopAgreement | None = None
        self._global_step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        trains = not getattr(strategy, "is_server", False)
        self._agreement = StopAgreement(run_store(strategy), trainer.global_rank if trains else None, _margin(strategy))
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            self._listener = SignalListener(_SIGNALS, self._agreement.ask)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._listener is not None:
            self._listener.listen()  # Lightning has set its own meanwhile
        self._global_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:  # gradients only accumulate: ranks are not in step
            return
        self._global_step = trainer.global_step
        assert self._agreement is not None
        if (signum := self._agreement.due(self._global_step)) is not None:
            self._stop(trainer, signum)

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        assert self._agreement is not None
        path = _checkpoint_path(trainer)
        if path is not None:
            with contextlib.suppress(StoppedBySignal):  # it is written, and waits for workers that have stopped already
                trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            self._agreement.saved()
            _requeue(trainer)
        else:
            self._agreement.await_saved(_SAVING_TAKES)
        name, saved = signal.Signals(signum).name, f"saved {path}" if path else "nothing saved"
        rank_zero_info(f"stopped by {name} after step {trainer.global_step}: {saved}")
        raise StoppedBySignal(signum, path)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._listener is not None:
            self._listener.stop()
        self._listener = self._agreement = None


def _margin(strategy: Any) -> int | None:
    """How far ahead of rank 0 another one can be; Lightning's own strategies do not say."""
    if hasattr(strategy, "steps_ahead"):
        return strategy.steps_ahead
    return 1 if strategy.root_device.type == "cpu" else _STEPS_AHEAD


def _checkpoint_path(trainer: pl.Trainer) -> Path | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath, f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}")
    return None


def _requeue(trainer: pl.Trainer) -> None:
    """What Lightning's own handler does under SLURM, where that was asked for."""
    environment = trainer._accelerator_connector.cluster_environment
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return
    job = SLURMEnvironment.job_id()
    if shutil.which("scontrol") is None:
        rank_zero_warn(f"SLURM job {job} is not requeued: there is no scontrol on this node")
        return
    subprocess.run(["scontrol", "requeue", str(job)], check=False)
