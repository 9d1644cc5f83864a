"""One job, as the two columns of `faults.py` start it: by `gradsync fit`, and by a script of plain Lightning DDP."""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from typing_extensions import override

_HERE = Path(__file__).resolve().parent
CHECKPOINTS = Path("run", "checkpoints")
"""Of a job, in the folder where it runs."""
_WITHOUT_LIMIT = 1_000_000
_SERVED = ("parameter_server",)


@final
@dataclass(frozen=True)
class Job:
    """A training of two ranks in the current folder, in which something goes wrong."""

    fault: str = "none"
    rank: int = 1
    at_step: int = 5
    num_epochs: int | None = 1
    """None: it has no end."""
    steps_per_epoch: int = 20
    num_fewer: int = 0
    num_more: int = 0
    dropout: float = 0.0
    pace_s: float = 0.0
    timeout_s: float | None = None
    """Of a step."""
    images: Path | None = None
    workers: int = 0
    every_n_steps: int | None = None
    resume: bool = False
    """From last.ckpt, if there is one."""
    ckpt_path: Path | None = None
    under_torchrun: bool = False
    options: tuple[str, ...] = ()
    """Flags that gradsync alone knows."""


class Column(ABC):
    """What is put to the trial."""

    name: str
    title: str
    is_ours = False
    first_process = 0
    """``LOCAL_RANK`` of rank 0."""

    def command(self, job: Job) -> list[str]:
        program = self._program(job)
        if not job.under_torchrun:
            return [sys.executable, *program]
        processes = f"--nproc_per_node={2 + self.first_process}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, "--max-restarts=2"]
        return [*torchrun, *program]

    @abstractmethod
    def _program(self, job: Job) -> list[str]:
        """What follows ``python``."""

    def knows(self, flag: str) -> bool:
        """Whether `flag` can be among a job's options."""
        return False


@final
class Ours(Column):
    """``gradsync fit`` under `strategy`, with all that it has on by default."""

    is_ours = True

    def __init__(self, strategy: str) -> None:
        self.strategy = self.name = strategy
        self.title = f"`gradsync fit`, `{strategy}`"
        self.first_process = 1 if strategy in _SERVED else 0

    @override
    def _program(self, job: Job) -> list[str]:
        flags = {
            "--trainer.strategy": self.strategy,
            "--trainer.accelerator": "cpu",
            "--trainer.devices": None if job.under_torchrun else 2 + self.first_process,
            "--trainer.max_epochs": job.num_epochs or _WITHOUT_LIMIT,
            **self._model_flags(job),
            **self._data_flags(job),
            "--run_dir": "run",
            "--trainer.use_distributed_sampler": "false" if job.num_fewer else None,
            "--ckpt_path": "last" if job.resume else job.ckpt_path,
            **self._timeout(job),
        }
        given = [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]
        return ["-m", "gradsync", "fit", *given, *_saving(job), *job.options]

    def _model_flags(self, job: Job) -> dict[str, object]:
        return {
            "--model": "fault_models.FaultyMlp",
            "--model.fault": job.fault,
            "--model.process": job.rank + self.first_process,
            "--model.at_step": job.at_step,
            "--model.num_features": 3 * 32 * 32 if job.images else 10,
            "--model.num_more": job.num_more,
            "--model.dropout": job.dropout,
            "--model.pace_s": job.pace_s,
        }

    @staticmethod
    def _data_flags(job: Job) -> dict[str, object]:
        if job.images is None:
            tiny = {"--data.steps_per_epoch": job.steps_per_epoch, "--data.num_fewer": job.num_fewer}
            return {"--data": "fault_models.TinyData", **tiny}
        sizes = {"--data.batch_size": 8, "--data.image_size": 32, "--data.num_workers": job.workers}
        return {"--data.root": job.images, **sizes, "--trainer.limit_val_batches": 0}

    def _timeout(self, job: Job) -> dict[str, object]:
        if job.timeout_s is None:
            return {}
        if self.strategy == "ddp":
            return {"--trainer.strategy.timeout": f"0:00:{job.timeout_s:02.0f}"}
        return {"--trainer.strategy.step_timeout_s": job.timeout_s}

    @override
    def knows(self, flag: str) -> bool:
        return flag in _help()


@final
class PlainDdp(Column):
    """A script with Lightning's Trainer and `DDPStrategy`."""

    name = "ddp"
    title = "plain Lightning DDP"

    @override
    def _program(self, job: Job) -> list[str]:
        flags = {
            "--epochs": job.num_epochs or _WITHOUT_LIMIT,
            "--steps-per-epoch": job.steps_per_epoch,
            "--num-fewer": job.num_fewer,
            "--images": job.images,
            "--workers": job.workers,
            "--timeout-s": job.timeout_s,
            "--every-n-steps": job.every_n_steps,
            "--ckpt-path": job.ckpt_path,
            "--fault": job.fault,
            "--process": job.rank,
            "--at-step": job.at_step,
            "--num-more": job.num_more,
            "--dropout": job.dropout,
            "--pace-s": job.pace_s,
        }
        given = [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]
        return [str(_HERE / "plain_ddp.py"), *given, *(["--resume"] if job.resume else [])]


def _saving(job: Job) -> list[str]:
    if job.every_n_steps is None:
        return []
    callback = "--trainer.callbacks"
    return [
        *(f"{callback}+=lightning.pytorch.callbacks.ModelCheckpoint", f"{callback}.dirpath={CHECKPOINTS}"),
        *(f"{callback}.every_n_train_steps={job.every_n_steps}", f"{callback}.save_top_k=-1"),
    ]


@cache
def _help() -> str:
    command = [sys.executable, "-m", "gradsync", "fit", "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
