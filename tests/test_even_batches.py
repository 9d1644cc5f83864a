"""Ranks that have different numbers of batches are told so, where DDP pairs the steps of different epochs, or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import run_distributed
from torch.utils.data import DataLoader, IterableDataset
from training import Mlp, make_data, make_strategy, make_trainer, quiet

from gradsync.callbacks import EvenBatches
from gradsync.comm.server import WorkerFailed
from gradsync.errors import UserError

STRATEGIES = {"ddp": 2, "manual_allreduce": 3, "sharded_server": 2, "parameter_server": 3}


class _Stream(IterableDataset[Any]):
    """Points without a known number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        data = make_data()
        return (data[index] for index in range(self.count))


def _fit(rank: int, strategy: str, world: int, counts: list[int], sized: bool) -> tuple[str, int]:
    """The error that a rank ends with, and the steps taken."""
    quiet()
    torch.manual_seed(0)
    at = rank - 1 if strategy == "parameter_server" else rank
    data = torch.utils.data.Subset(make_data(), range(counts[at] * 8)) if sized else _Stream(counts[at] * 8)
    is_short = strategy != "ddp" and len(set(counts)) > 1  # the limit is waited for
    options = {"step_timeout_s": 5.0} if is_short else {}
    own = make_strategy(strategy, options)
    trainer = make_trainer(
        own, world, max_steps=-1, max_epochs=2, callbacks=[EvenBatches()], use_distributed_sampler=False
    )
    try:
        trainer.fit(Mlp(), DataLoader(data, batch_size=8))
    except (UserError, WorkerFailed, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", trainer.global_step
    return "", trainer.global_step


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_known_numbers_are_refused_before_the_first_step(strategy: str) -> None:
    results = run_distributed(_fit, STRATEGIES[strategy], strategy, STRATEGIES[strategy], [4, 3, 3], True)
    for error, steps in results[strategy == "parameter_server" :]:
        assert "4 on rank 0, 3 on rank 1" in error
        assert "--trainer.limit_train_batches 3" in error
        assert steps == 0


@pytest.mark.parametrize("strategy", ["manual_allreduce", "sharded_server"])
def test_data_that_end_early_are_named(strategy: str) -> None:
    first, second = run_distributed(_fit, 2, strategy, 2, [5, 3], False)
    assert "training data of rank 1 ended after 3 batches: rank 0 goes on" in second[0]
    assert second[1] == 3
    assert first[0], "nobody trains alone"


@pytest.mark.parametrize("sized", [True, False])
def test_equal_numbers_train(sized: bool) -> None:
    results = run_distributed(_fit, 2, "manual_allreduce", 2, [3, 3], sized)
    assert results == [("", 6), ("", 6)]
