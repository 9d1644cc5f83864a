"""``parameter_server`` with ``transport: collective``: one reduce and one broadcast per bucket."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import free_port, run_distributed
from training import newest_checkpoint, train

from gradsync.comm.buckets import make_buckets
from gradsync.comm.server.collective import CollectivePeers

COLLECTIVE = {"transport": "collective"}
AWKWARD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, 1 / 3, -1 / 3, 1e-7, 1.0]


def _gradients(worker: int) -> torch.Tensor:
    """All pairs of awkward values over two workers."""
    values = torch.tensor(AWKWARD)
    return (values.repeat(len(values)) if worker == 0 else values.repeat_interleave(len(values))).clone()


def _average(rank: int, port: int) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    peers = CollectivePeers(store, rank, 3, "gloo", timedelta(seconds=30), timedelta(seconds=30))
    parameters = [torch.nn.Parameter(torch.zeros(len(AWKWARD) ** 2)) for _ in range(2)]
    buckets = make_buckets([[parameter] for parameter in parameters])
    if rank == 0:
        peers.collect(buckets, lambda: None)
        averages = buckets[0].buffer().clone()
        peers.distribute(buckets, lambda: None)
        return averages
    parameters[0].grad = _gradients(rank - 1)  # and none for the other
    peers.push_pull(buckets, lambda: None)
    return parameters[0].detach()


def _all_reduce(rank: int, port: int) -> torch.Tensor:
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    group: Any = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
    average = _gradients(rank) * 0.5  # as DDP
    group.allreduce([average]).wait()
    return average


def test_the_average_is_that_of_an_all_reduce_to_the_last_bit_and_sign_of_zero() -> None:
    average, *taken = run_distributed(_average, 3, free_port())
    expected = run_distributed(_all_reduce, 2, free_port())[0]
    for values in (average, *taken):
        assert torch.equal(values.view(torch.int32), expected.view(torch.int32))


def _close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_weights_are_those_of_ddp_with_parameters_that_nobody_uses_left_alone(num_workers: int) -> None:
    model = {"unused": True, **({} if num_workers == 3 else {"optimizer": "adamw", "batch_norm": True})}
    ours = run_distributed(train, num_workers + 1, "parameter_server", num_workers + 1, model, {}, COLLECTIVE)
    ddp = run_distributed(train, num_workers, "ddp", num_workers, model, {}, {"find_unused_parameters": True})
    # three terms round differently in another order, about 1e-7 a step
    atol = 0 if num_workers < 3 else 1e-6
    for state, reference in zip(ours[1:], ddp, strict=True):
        _close(state, reference, atol)
    _close(ours[0], ours[1], 0)


def test_a_run_resumes_to_the_bit_in_shared_memory_and_back(tmp_path: Path) -> None:
    def fit(options: dict[str, Any], folder: str, max_epochs: int, ckpt_path: str | None = None) -> Any:
        trainer = {"max_steps": -1, "max_epochs": max_epochs, "enable_checkpointing": True}
        trainer["default_root_dir"] = str(tmp_path / folder)
        return run_distributed(train, 3, "parameter_server", 3, {"optimizer": "adamw"}, trainer, options, ckpt_path, 32)

    whole = fit(COLLECTIVE, "whole", 3)
    fit(COLLECTIVE, "parts", 1)
    fit({}, "parts", 2, newest_checkpoint(next((tmp_path / "parts").rglob("checkpoints"))))
    resumed = fit(COLLECTIVE, "parts", 3, newest_checkpoint(next((tmp_path / "parts").rglob("checkpoints"))))
    _close(whole[1], resumed[1], 0)
