"""Bytes that we report against bytes that the kernel counts, in a network namespace that nobody else uses."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import shutil
import subprocess
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_strategy, make_trainer, num_processes, quiet

from gradsync.callbacks import CommunicationMonitor

_CLONE_NEWNET = 0x40000000
NUM_STEPS, FIRST = 6, 3
"""Counted are the steps from FIRST on: before, processes greet each other and share the model."""


class Wide(pl.LightningModule):
    """25 MB of parameters, so that greetings and headers are a small part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Count(pl.Callback):
    """Between two barriers: what sockets of this network have received, and what the monitor says of this rank."""

    def __init__(self, monitor: CommunicationMonitor) -> None:
        self.monitor, self.reported, self.carried = monitor, 0.0, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        step = self.monitor.last_step
        assert step is not None
        if index >= FIRST:
            self.reported += step.num_bytes
        if index == FIRST - 1 or index == NUM_STEPS - 1:
            trainer.strategy.barrier()
            self.carried = _carried() - self.carried
            trainer.strategy.barrier()


def _carried() -> int:
    """Payload that all sockets have received: what TCP sent twice on a busy machine, and headers, do not count."""
    sockets = subprocess.run(["ss", "--tcp", "--info", "--no-header"], capture_output=True, text=True, check=True)
    return sum(int(num_bytes) for num_bytes in re.findall(r"bytes_received:(\d+)", sockets.stdout))


def _fit(rank: int, strategy: str, processes: int, options: dict[str, Any]) -> tuple[float, int]:
    quiet()
    monitor = CommunicationMonitor(warmup_steps=0)
    count = Count(monitor)
    callbacks = [monitor, count]
    trainer = make_trainer(make_strategy(strategy, options), processes, max_steps=NUM_STEPS, callbacks=callbacks)
    trainer.fit(Wide(), DataLoader(TensorDataset(torch.randn(64, 1024)), batch_size=2))
    return count.reported, count.carried


def _alone_on_the_network(results: Any, *args: Any) -> None:
    tools = shutil.which("ip") and shutil.which("ss")
    if (
        not tools
        or ctypes.CDLL(None).unshare(_CLONE_NEWNET)
        or subprocess.run(["ip", "link", "set", "lo", "up"]).returncode
    ):
        results.put(None)
        return
    results.put(run_distributed(_fit, args[1], *args))


def _run(strategy: str, options: dict[str, Any]) -> list[tuple[float, int]]:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = num_processes(strategy, 2)
    process = context.Process(target=_alone_on_the_network, args=(results, strategy, processes, options))
    process.start()
    process.join()  # it has a limit of its own: that of its ranks
    assert process.exitcode == 0, "its ranks failed: see stderr"
    if (found := results.get()) is None:
        pytest.skip("needs a network namespace of its own: root, and Debian's package iproute2")
    return found


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {}),
        ("manual_allreduce", {"algorithm": "native"}),
        ("manual_allreduce", {"algorithm": "ring"}),
        ("manual_allreduce", {"algorithm": "halving_doubling"}),
        ("manual_allreduce", {"algorithm": "naive"}),
        ("parameter_server", {"transport": "tcp"}),
        ("parameter_server", {"transport": "tcp", "wire_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_reported_bytes_are_those_of_the_kernel(strategy: str, options: dict[str, Any]) -> None:
    """Every byte is carried once, and reported by who sends it and by who gets it."""
    found = _run(strategy, options)
    trainers = found[1:] if strategy == "parameter_server" else found
    carried = max(carried for _, carried in trainers)
    per_byte = 1 if strategy == "parameter_server" else 2  # the server reports nothing here
    # what barriers and ZeroMQ's frames add: below 1 % of so many bytes
    assert sum(reported for reported, _ in trainers) / per_byte == pytest.approx(carried, rel=0.01)


@pytest.mark.parametrize("strategy", ["parameter_server", "sharded_server"])
def test_gloo_moves_more_than_its_collectives_need(strategy: str) -> None:
    """Reported is what a reduce, broadcast, reduce-scatter and all-gather need; the docs name the difference."""
    found = _run(strategy, {"transport": "collective"})
    needed = sum(reported for reported, _ in found) / (1 if strategy == "parameter_server" else 2)
    carried = max(carried for _, carried in found)
    assert 1.3 < carried / needed < 1.55


@pytest.mark.parametrize("strategy", ["manual_allreduce", "parameter_server", "sharded_server"])
def test_what_goes_through_shared_memory_is_on_no_network(strategy: str) -> None:
    found = _run(strategy, {})
    reported, carried = found[-1]
    assert reported > 100e6
    assert carried < 0.01 * reported
