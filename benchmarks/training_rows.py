"""The training loops that `step.py` compares: same network, data, optimizer and number of steps in all of them."""

from __future__ import annotations

import hashlib
import os
import resource
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torchvision
from harness import Process, cpu_s
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader
from typing_extensions import override

from gradsync.callbacks import CommunicationMonitor
from gradsync.comm.memory import keep_freed_memory
from gradsync.strategies import ManualAllReduceStrategy, ParameterServerStrategy, ShardedServerStrategy

NUM_CLASSES = 1000
_NUM_BATCHES = 2
_SETTLING_STEPS = 1
"""At the begin of a turn: caches hold what others did meanwhile."""


@dataclass(frozen=True)
class Workload:
    """What every training process does, whatever the row."""

    arch: str
    image_size: int
    batch_size: int
    warmup: int
    turns: int
    steps_per_turn: int
    """Those that are timed."""

    @property
    def total_steps(self) -> int:
        return self.warmup + self.turns * (_SETTLING_STEPS + self.steps_per_turn)

    def network(self) -> nn.Module:
        """The same weights in every process."""
        torch.manual_seed(0)
        return torchvision.models.get_model(self.arch, num_classes=NUM_CLASSES)

    def batches(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """A batch per step, in memory already; other data on every rank, or equal replicas would prove nothing."""
        generator = torch.Generator().manual_seed(rank + 1)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        made = [
            (
                torch.randn(shape, generator=generator),
                torch.randint(NUM_CLASSES, shape[:1], generator=generator),
            )
            for _ in range(_NUM_BATCHES)
        ]
        return [made[step % _NUM_BATCHES] for step in range(self.total_steps)]


def optimizer_of(network: nn.Module) -> SGD:
    return SGD(network.parameters(), lr=1e-4, momentum=0.9, fused=True)


def fingerprint(network: nn.Module) -> str:
    """Equal for parameters that are equal to the bit."""
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@final
class StepClock:
    """Times the steps of every turn, and waits between two turns until it is told to go on.

    Args:
        parent: Takes the metrics of every turn (None of the warm-up) and answers when the next one begins.
        server_pid: A process that trains nothing, whose processor time counts too.

    Attributes:
        also: Further figures that grow, as they are now.
    """

    also: Callable[[], dict[str, float]] = dict

    def __init__(self, workload: Workload, parent: Connection, server_pid: int | None) -> None:
        self._workload = workload
        self._parent = parent
        self._server_pid = server_pid
        self._num_steps = 0
        self._before_turn = workload.warmup
        self._start: dict[str, float] = {}

    def step_done(self) -> None:
        self._num_steps += 1
        in_turn = self._num_steps - self._before_turn
        if in_turn == 0:
            self._end_turn(None)
        elif in_turn == _SETTLING_STEPS:
            self._start = self._now()
        elif in_turn == _SETTLING_STEPS + self._workload.steps_per_turn:
            self._before_turn = self._num_steps
            self._end_turn(self._metrics())

    def _end_turn(self, metrics: dict[str, float] | None) -> None:
        self._parent.send(metrics)
        if self._num_steps < self._workload.total_steps:
            self._parent.recv()

    def _now(self) -> dict[str, float]:
        times = os.times()
        now = {"step_ms": 1000 * time.perf_counter(), "cpu_ms": 1000 * (times.user + times.system)}
        now["page_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if self._server_pid is not None:
            now["server_cpu_ms"] = 1000 * cpu_s(self._server_pid)
        return now | self.also()

    def _metrics(self) -> dict[str, float]:
        """Per step."""
        now = self._now()
        return {name: (now[name] - start) / self._workload.steps_per_turn for name, start in self._start.items()}


@final
class ClockCallback(Callback):
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_done()


@final
class Classifier(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    @override
    def configure_optimizers(self) -> SGD:
        return optimizer_of(self)


class Row(ABC):
    """One way to train."""

    num_servers = 0
    synchronizes = True
    """Whether replicas are to be equal on all ranks."""

    def run(self, process: Process, workload: Workload, parents: Sequence[Connection]) -> str | None:
        """Train in a process of the group; a fingerprint of the weights, None from a server.

        ``parents``: one per training process, see :class:`StepClock`.
        """
        warnings.filterwarnings("ignore")  # hints of Lightning about loaders and ranks
        torch.set_num_threads(1)
        rank = process.index - self.num_servers
        server_pid = process.earlier_pids[0] if self.num_servers and rank >= 0 else None
        clock = StepClock(workload, parents[rank], server_pid)
        network = workload.network()
        self.train(process, workload, network, workload.batches(rank), clock)
        return None if rank < 0 else fingerprint(network)

    @abstractmethod
    def train(
        self, process: Process, workload: Workload, network: nn.Module, batches: list[Any], clock: StepClock
    ) -> None:
        """All steps, telling `clock` of each; leaves the weights in `network`."""


@final
class RawDDP(Row):
    """A loop without any framework."""

    @override
    def train(
        self, process: Process, workload: Workload, network: nn.Module, batches: list[Any], clock: StepClock
    ) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        optimizer = optimizer_of(model)
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            clock.step_done()


@final
class Accelerate(Row):
    """The same loop as Accelerate's users write it."""

    @override
    def train(
        self, process: Process, workload: Workload, network: nn.Module, batches: list[Any], clock: StepClock
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
        model, optimizer = accelerator.prepare(network, optimizer_of(network))
        assert isinstance(model, DistributedDataParallel)
        for images, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(images), labels))
            optimizer.step()
            clock.step_done()


Observe = Callable[[Process, Workload, StepClock], dict[str, Any]]
"""Options of the Trainer by which a run is watched."""


@final
class LightningLoop(Row):
    """Lightning's loop, always with the same callbacks.

    Args:
        strategy: Makes the strategy; :class:`SingleDeviceStrategy` is no communication at all.
        num_servers: Processes beside the training ones.
        observe: Makes further options of the Trainer: callbacks, a logger.
    """

    def __init__(
        self,
        strategy: Callable[[], Strategy],
        num_servers: int = 0,
        synchronizes: bool = True,
        observe: Observe = lambda process, workload, clock: {"callbacks": [CommunicationMonitor(workload.warmup)]},
    ) -> None:
        self._observe = observe
        self._strategy = strategy
        self.num_servers = num_servers
        self.synchronizes = synchronizes

    def observed_by(self, observe: Observe) -> LightningLoop:
        """The same row with other options of the Trainer."""
        return LightningLoop(self._strategy, self.num_servers, self.synchronizes, observe)

    @override
    def train(
        self, process: Process, workload: Workload, network: nn.Module, batches: list[Any], clock: StepClock
    ) -> None:
        options: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            **self._observe(process, workload, clock),
        }
        options["callbacks"] = [*options["callbacks"], ClockCallback(clock)]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=process.size if self.synchronizes else 1,
            strategy=self._strategy(),
            max_epochs=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # every rank has its own batches
            **options,
        )
        trainer.fit(Classifier(network), DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]


def _ddp() -> Strategy:
    return DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)


def _ddp_keeping_memory() -> Strategy:
    """DDP in a process that keeps freed memory, which gradsync's strategies see to by default."""
    keep_freed_memory()
    return _ddp()


def alone_keeping_memory() -> Strategy:
    keep_freed_memory()
    return SingleDeviceStrategy("cpu")


def _parameter_server(**options: Any) -> LightningLoop:
    return LightningLoop(
        lambda: ParameterServerStrategy(**options, server_log_every_n_steps=0), num_servers=options.get("servers", 1)
    )


ROWS: dict[str, Row] = {
    "raw_ddp": RawDDP(),
    "accelerate": Accelerate(),
    "ddp": LightningLoop(_ddp),
    "ddp_keeping_memory": LightningLoop(_ddp_keeping_memory),
    "manual_allreduce": LightningLoop(ManualAllReduceStrategy),
    "sharded_server": LightningLoop(ShardedServerStrategy),
    "sharded_server_sharing": LightningLoop(lambda: ShardedServerStrategy(share_parameters=True)),
    "parameter_server": _parameter_server(),
    "parameter_server_sharing": _parameter_server(share_parameters=True),
    "two_servers": _parameter_server(servers=2),
    "parameter_server_tcp": _parameter_server(transport="tcp"),
    "naive": _parameter_server(transport="naive"),
    "no_communication": LightningLoop(lambda: SingleDeviceStrategy("cpu"), synchronizes=False),
    "no_communication_keeping_memory": LightningLoop(alone_keeping_memory, synchronizes=False),
}
