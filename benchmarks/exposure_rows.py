"""What `exposure.py` trains: a network that computes little and communicates much, with and without an exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import lightning.pytorch as pl
import torch
from harness import Process
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.futures import Future
from training_rows import LightningLoop, Observe, StepClock, Workload, alone_keeping_memory
from typing_extensions import override

from gradsync.callbacks import CommunicationMonitor
from gradsync.comm import ALGORITHMS
from gradsync.strategies import ManualAllReduceStrategy, ParameterServerStrategy, ShardedServerStrategy

_WIDTH = 1024
_HUGE_MIB = 10_000
"""One bucket for all: its exchange begins when the last gradient is ready, as without overlap."""


@final
@dataclass(frozen=True)
class WideWorkload(Workload):
    """Linear layers without buffers. ``image_size`` is how many; 4 MiB each."""

    @override
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(self.image_size)))

    @override
    def batches(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(rank + 1)
        points = torch.randn(self.batch_size, _WIDTH, generator=generator)
        return [(points, torch.randint(_WIDTH, (self.batch_size,), generator=generator))] * self.total_steps


@final
class Sums(Callback):
    """Adds up the figures of all steps; stands between the monitor and the clock."""

    def __init__(self, monitor: CommunicationMonitor) -> None:
        self._monitor = monitor
        self.so_far = {"exposed_ms": 0.0, "optimizer_ms": 0.0}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = self._monitor.last_step
        assert step is not None
        self.so_far = {name: value + getattr(step, name) for name, value in self.so_far.items()}


@final
class NoExchange(Callback):
    """DDP goes through all its motions but the all-reduce."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ddp: Any = trainer.strategy.model
        ddp.register_comm_hook(None, _hand_back)


def _hand_back(state, bucket):  # without annotations: DDP refuses those that are strings
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


def _observe(*more: Callback) -> Observe:
    def options(process: Process, workload: Workload, clock: StepClock) -> dict[str, Any]:
        monitor = CommunicationMonitor(workload.warmup)
        sums = Sums(monitor)
        clock.also = lambda: dict(sums.so_far)
        return {"callbacks": [*more, monitor, sums]}

    return options


def _ddp(bucket_mib: int) -> Any:
    return lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True, bucket_cap_mb=bucket_mib)


def _server(**options: Any) -> LightningLoop:
    return LightningLoop(
        lambda: ParameterServerStrategy(server_log_every_n_steps=0, **options), num_servers=1, observe=_observe()
    )


def rows() -> dict[str, tuple[LightningLoop, str]]:
    """By name: what is measured, and the row without its exchange."""
    made: dict[str, tuple[LightningLoop, str]] = {
        "ddp": (LightningLoop(_ddp(_HUGE_MIB), observe=_observe()), "ddp_no_op"),
        "ddp_overlap": (LightningLoop(_ddp(25), observe=_observe()), "ddp_overlap_no_op"),
        "sharded_server": (_ours(ShardedServerStrategy, overlap=False), "no_op"),
        "sharded_server_overlap": (_ours(ShardedServerStrategy), "no_op"),
        "parameter_server": (_server(), "no_op"),
        "parameter_server_tcp": (_server(transport="tcp"), "no_op"),
    }
    for algorithm in (name for name in ALGORITHMS if name != "hierarchical"):  # that needs several hosts
        made[algorithm] = (_ours(ManualAllReduceStrategy, algorithm=algorithm, overlap=False), "no_op")
    made["shared_memory_overlap"] = (_ours(ManualAllReduceStrategy, algorithm="shared_memory"), "no_op")
    made["native_overlap"] = (_ours(ManualAllReduceStrategy, algorithm="native"), "no_op")
    return made


def no_op_rows() -> dict[str, LightningLoop]:
    """DDP with a hook that hands gradients back, and a process that trains alone."""
    return {
        "ddp_no_op": LightningLoop(_ddp(_HUGE_MIB), synchronizes=True, observe=_observe(NoExchange())),
        "ddp_overlap_no_op": LightningLoop(_ddp(25), synchronizes=True, observe=_observe(NoExchange())),
        # in a process that keeps freed memory, as our strategies do: page faults are no communication
        "no_op": LightningLoop(alone_keeping_memory, synchronizes=False, observe=_observe()),
    }


def _ours(strategy: Any, **options: Any) -> LightningLoop:
    return LightningLoop(lambda: strategy(**options), observe=_observe())
