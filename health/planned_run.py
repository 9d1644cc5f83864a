"""The run that a machine is checked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from ..datamodules.imagenet import default_num_workers

_IMAGE_BYTES = 3 * 224 * 224
_BATCH_SIZE = 64
_BATCHES_IN_FLIGHT = 3  # two that torch's loader fetches ahead for each worker, and the one being made


@final
@dataclass(frozen=True)
class PlannedRun:
    """Defaults of ``gradsync fit`` on this machine: ResNet50, 64 images of 224 pixels per rank and step.

    Attributes:
        devices: Number of ranks on this host.
        timeout_s: How long the ranks that are started here may take from one step to the next.
    """

    devices: int
    accelerator: Literal["cpu", "gpu"]
    output: Path
    data_dir: str | None
    timeout_s: float

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        return "nccl" if self.accelerator == "gpu" else "gloo"

    @property
    def num_workers(self) -> int:
        """Loader processes of each rank; the bundled images are read without any."""
        return 0 if self.data_dir is None else default_num_workers(self.devices)

    @property
    def batch_bytes(self) -> int:
        return _BATCH_SIZE * _IMAGE_BYTES

    @property
    def loader_bytes(self) -> int:
        """What the batches of all loader processes occupy in /dev/shm at most."""
        return self.devices * self.num_workers * _BATCHES_IN_FLIGHT * self.batch_bytes


@final
@dataclass(frozen=True)
class Launched:
    """This process's place in a run that torchrun, or another launcher, has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> Launched | None:
        """None without a launcher. Raises: ValueError, for a variable that is no number."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if any(name not in os.environ for name in names):
            return None
        rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local_rank, local_world_size, os.environ["MASTER_ADDR"], port)
