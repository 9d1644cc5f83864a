from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsync.callbacks import DDPTimeline
from gradsync.comm.timeline import StepCommunication


class Model(nn.Module):
    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.extra = nn.Linear(8, 8, bias=False) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.first(x)))


def join(rank: int, *, unused: bool = False, world_size: int = 2) -> DistributedDataParallel:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    return DistributedDataParallel(Model(unused), find_unused_parameters=unused)


def step(ddp: DistributedDataParallel, *, sync: bool = True) -> None:
    with nullcontext() if sync else ddp.no_sync():
        ddp(torch.ones(2, 8)).sum().backward()


def plain_steps(rank: int, unused: bool) -> list[StepCommunication | None]:
    ddp = join(rank, unused=unused)
    timeline = DDPTimeline(ddp)
    taken = [timeline.take_step()]
    for _ in range(14):  # DDP by itself samples the first ten iterations only
        step(ddp)
        taken.append(timeline.take_step())
    taken.append(timeline.take_step())
    return taken


@pytest.mark.parametrize("unused", [False, True])
def test_every_iteration_is_seen_once(unused: bool) -> None:
    num_bytes = 8 * 8 * 4 * (3 if unused else 2)
    for taken in run_distributed(plain_steps, 2, unused):
        assert taken[0] is None
        assert taken[-1] is None
        assert len(taken) == 16
        for comm in taken[1:-1]:
            assert 0.0 < comm.exposed_ms <= comm.total_ms < 60_000  # milliseconds, not nanoseconds
            assert comm.num_bytes == 2 * num_bytes  # a ring of two: each half goes out and comes in twice
            assert comm.total_is_upper_bound


def accumulated_steps(rank: int) -> list[bool]:
    ddp = join(rank)
    timeline = DDPTimeline(ddp)
    seen = []
    for sync in (False, False, True, False, True, True):
        step(ddp, sync=sync)
        seen.append(timeline.take_step() is not None)
    return seen


def test_passes_that_accumulate_are_no_iterations() -> None:
    for seen in run_distributed(accumulated_steps, 2):
        assert seen == [False, False, True, False, True, True]


def late_peer(rank: int, wait_s: float) -> float:
    """Rank 1 begins its backward pass `wait_s` after rank 0 has all its own gradients."""
    ddp = join(rank)
    timeline = DDPTimeline(ddp)
    step(ddp)
    timeline.take_step()
    store = dist.distributed_c10d._get_default_store()
    loss = ddp(torch.ones(2, 8)).sum()
    if rank == 0:
        first = ddp.module.first.weight
        first.register_hook(lambda _: store.set("ready", "yes"))
    else:
        store.wait(["ready"])
        time.sleep(wait_s)
    loss.backward()
    comm = timeline.take_step()
    assert comm is not None
    return comm.exposed_ms


def test_waiting_for_a_late_peer_is_exposed() -> None:
    exposed_ms, _ = run_distributed(late_peer, 2, 1.0)
    assert exposed_ms >= 100.0


def alone(rank: int) -> StepCommunication | None:
    ddp = join(rank, world_size=1)
    timeline = DDPTimeline(ddp)
    step(ddp)
    return timeline.take_step()


def test_a_world_of_one_moves_no_bytes() -> None:
    (comm,) = run_distributed(alone, 1)
    assert comm.num_bytes == 0
