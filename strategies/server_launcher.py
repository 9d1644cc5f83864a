"""Starts the processes of a parameter-server run: this one serves, the others train."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, final

import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

from ..failures import introduce
from ..template import start_process
from .profiling import without_torch_profiler
from .worker_return import INCARNATION

if TYPE_CHECKING:
    from .parameter_server import ParameterServerStrategy


_CKPT_PATH = 4
"""Where Lightning passes ``ckpt_path`` to the function that fits."""
_GRACE_S = 2.0
"""How long processes may take to say their last words."""


class ServingDone(BaseException):
    """Unwinds the server process out of the Trainer when all workers have left. Not an error, never shown."""


@final
class ServerLauncher(_SubprocessScriptLauncher):
    """Runs Lightning's entry point on every process; on process 0 it ends inside ``strategy.setup``, which serves.

    The server thereby passes the same hooks as a worker (datamodule and module ``setup``, ``configure_model``)
    and needs no second way to build the model. Unlike Lightning's, it watches the children itself: their
    observer would kill this process before it could say who failed.
    """

    def __init__(self, strategy: ParameterServerStrategy, *args: Any) -> None:
        super().__init__(*args)
        self._strategy = strategy
        self.given_up: list[subprocess.Popen[bytes]] = []
        """Processes that the run has gone on without."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        assert trainer is not None
        if self._strategy.incarnation > 0:
            args = (*args[:_CKPT_PATH], self._strategy.ask_for_position(), *args[_CKPT_PATH + 1 :])
        with without_torch_profiler(trainer) if self._strategy.is_server else nullcontext():
            try:
                result = function(*args, **kwargs)
            except ServingDone:
                return self._end(trainer)
        self._strategy.leave(trainer, result)
        return result

    def _end(self, trainer: pl.Trainer) -> Any:
        """Leave the trainer as after a normal run, with worker 0's metrics and checkpoint paths in it."""
        trainer._teardown()
        call._call_teardown_hook(trainer)
        trainer.state.status = TrainerStatus.FINISHED
        trainer.state.stage = None
        trainer.training = False
        return self._strategy.hand_over(trainer)

    def end_children(self) -> None:
        """After a failure: SIGTERM, and SIGKILL where that has no effect (a process that is stopped, say)."""
        self.kill(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while any(process.poll() is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill(signal.SIGKILL)

    def replace(self, process_rank: int, name: str, incarnation: int | None) -> bool:
        """End this child, which may be stopped, and start another if there is to be a next incarnation.

        Returns whether it has: torchrun's processes and those of other hosts are not its children.
        """
        if process_rank > len(self.procs):
            return False
        process = self.procs[process_rank - 1]
        self.given_up.append(process)
        process.kill()
        if incarnation is not None:
            environment = {**os.environ, "LOCAL_RANK": str(process_rank), INCARNATION: str(incarnation)}
            self.procs[process_rank - 1] = process = start_process([*_basic_subprocess_cmd()], environment)
            introduce(name, process.pid, may_be_lost=True)
        return incarnation is not None

    def exit_codes(self) -> dict[int, int]:
        """By process rank, of all children that have ended with an error and were not replaced.

        Their status stays there for the supervisor, who may come later and names the failed process by it.
        """
        codes = {
            index + 1: _exit_code(process) for index, process in enumerate(self.procs) if process not in self.given_up
        }
        return {rank: code for rank, code in codes.items() if code}


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """As ``process.poll()``, which would take the status away."""
    if process.returncode is not None:
        return process.returncode
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # Lightning's observer is just taking it, in a script that no supervisor watches
        return process.poll()
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
