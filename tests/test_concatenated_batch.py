"""Sync mode of the parameter server is one process that trains on all workers' batches together."""

from __future__ import annotations

import random
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from training import NUM_CLASSES, make_data, make_strategy, make_trainer, quiet

NUM_STEPS = 50
BATCH = 6


class Net(pl.LightningModule):
    """No BatchNorm and no dropout: the loss is a plain mean over images."""

    def __init__(self, dtype: torch.dtype, delay_seed: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, NUM_CLASSES)).to(dtype)
        self.random = random.Random(delay_seed)
        self.delays = delay_seed is not None

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.delays:  # workers arrive in another order in every step
            time.sleep(self.random.uniform(0, 0.004))
        points, labels = batch
        return nn.functional.cross_entropy(self.net(points.to(self.net[0].weight.dtype)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _alone(rank: int, num_workers: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the workers of a step train on, as one batch: a sampler deals images out in turn."""
    pl.seed_everything(1, verbose=False)
    module = Net(dtype)
    optimizer: Any = module.configure_optimizers()
    for batch in _global_batches(num_workers):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    return module.state_dict()


def _global_batches(num_workers: int) -> list[Any]:
    return list(DataLoader(_data(num_workers), batch_size=BATCH * num_workers))


def _data(num_workers: int) -> Any:
    return make_data(NUM_STEPS * BATCH * num_workers)


def _served(
    rank: int, processes: int, num_workers: int, dtype: torch.dtype, options: dict[str, Any], delay_seed: int | None
) -> dict[str, torch.Tensor]:
    quiet()
    pl.seed_everything(1, verbose=False)
    module = Net(dtype, None if delay_seed is None else delay_seed + rank)
    strategy = make_strategy("parameter_server", options)
    trainer = make_trainer(strategy, processes, max_steps=NUM_STEPS, use_distributed_sampler=False)
    worker = max(0, rank - options.get("servers", 1))  # a server draws no samples
    sampler = DistributedSampler(_data(num_workers), num_workers, worker, shuffle=False)
    trainer.fit(module, DataLoader(_data(num_workers), batch_size=BATCH, sampler=sampler))
    return module.state_dict()


def _train(
    num_workers: int, dtype: torch.dtype, delay_seed: int | None = None, **options: Any
) -> list[dict[str, torch.Tensor]]:
    processes = num_workers + options.get("servers", 1)
    return run_distributed(_served, processes, processes, num_workers, dtype, options, delay_seed)


@pytest.mark.parametrize("options", [{}, {"transport": "tcp"}, {"transport": "collective"}, {"servers": 2}], ids=str)
@pytest.mark.parametrize("num_workers", [2, 3])
# 50 steps of sums in another order: some 1e-8 and 1e-16 a step for values of about 1
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_workers_together_equal_one_process(
    dtype: torch.dtype, atol: float, num_workers: int, options: dict[str, Any]
) -> None:
    ours, alone = _train(num_workers, dtype, **options), run_distributed(_alone, 1, num_workers, dtype)[0]
    for state in ours[-num_workers:]:
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=atol)


def test_the_order_of_arrival_changes_no_bit() -> None:
    first, second = (_train(3, torch.float32, delay_seed=seed)[0] for seed in (100, 200))
    assert all(torch.equal(first[name], second[name]) for name in first)
