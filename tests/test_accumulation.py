"""Gradient accumulation: one exchange per optimizer step under every strategy, and the same weights as under DDP."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader
from training import Mlp, Traffic, make_data, make_strategy, make_trainer, num_processes, quiet, trainers_only

STRATEGIES = ["ddp", "manual_allreduce", "parameter_server", "sharded_server"]
NUM_BATCHES = 10
"""Of each rank in an epoch: with windows of four the last one is incomplete."""

Fitted = tuple[dict[str, torch.Tensor], list[int]]
_references: dict[Any, list[Fitted]] = {}


def fit(rank: int, strategy: str, devices: int, window: int | dict[int, int]) -> Fitted:
    """Two epochs: the weights, and the bytes of every exchange."""
    quiet()
    pl.seed_everything(1, verbose=False)
    traffic = Traffic()
    scheduled = isinstance(window, dict)
    trainer = make_trainer(
        make_strategy(strategy),
        devices,
        max_steps=-1,
        max_epochs=2,
        limit_train_batches=NUM_BATCHES,
        accumulate_grad_batches=1 if scheduled else window,
        callbacks=[traffic, *([GradientAccumulationScheduler(window)] if scheduled else [])],
    )
    module = Mlp(optimizer="adamw")
    trainer.fit(module, DataLoader(make_data(), batch_size=8))
    return {name: value.clone() for name, value in module.state_dict().items()}, traffic.bytes


def _fitted(strategy: str, window: int | dict[int, int]) -> list[Fitted]:
    key = (strategy, str(window))
    if key not in _references:
        processes = num_processes(strategy, 2)
        _references[key] = trainers_only(strategy, run_distributed(fit, processes, strategy, processes, window))
    return _references[key]


@pytest.mark.parametrize(("window", "num_steps"), [(1, 20), (4, 2 * 3), ({0: 1, 1: 4}, 10 + 3)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_communicates_once_per_optimizer_step(strategy: str, window: int | dict[int, int], num_steps: int) -> None:
    every_step = _fitted(strategy, 1)[0][1]
    for (weights, exchanged), (reference, _) in zip(_fitted(strategy, window), _fitted("ddp", window), strict=True):
        assert exchanged == every_step[:1] * num_steps
        assert all(torch.equal(value, reference[name]) for name, value in weights.items())


def test_the_window_changes_the_weights() -> None:
    one, four = _fitted("ddp", 1)[0][0], _fitted("ddp", 4)[0][0]
    assert not torch.equal(one["net.0.weight"], four["net.0.weight"])
