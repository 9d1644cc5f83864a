"""What one rank does: it forms a process group with the others, and times what a run will do all the time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any, final

import torch
import torch.distributed as dist

from ..comm.algorithms.choice import obstacle_to_sharing
from .check import MIB, RESNET50_BYTES

LARGE_BYTES = 64 * MIB
_PAIR_BYTES = 16 * MIB
_NUM_SMALL, _NUM_LARGE, _NUM_WARM_UP = 50, 3, 5
_MOST_RANKS_IN_ALL_PAIRS = 8
_GRACE_S = 10.0


@final
@dataclass(frozen=True)
class Place:
    """A rank of the trial. ``is_one_host``: of all ranks."""

    rank: int
    world_size: int
    local_rank: int
    backend: str
    is_one_host: bool
    timeout_s: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.backend == "nccl" else torch.device("cpu")

    @property
    def timeout(self) -> timedelta:
        """Longer than that of whoever watches, which knows better who is missing."""
        return timedelta(seconds=self.timeout_s + _GRACE_S)


def pairs_of(world_size: int) -> list[tuple[int, int]]:
    """All pairs of ranks; of many ranks only neighbours."""
    if world_size <= _MOST_RANKS_IN_ALL_PAIRS:
        return list(itertools.combinations(range(world_size), 2))
    return [(rank, rank + 1) for rank in range(world_size - 1)]


def steps_of(world_size: int) -> list[str]:
    """What all ranks do, in this order: each says so before each."""
    pairs = [f"ranks {a} and {b} talking" for a, b in pairs_of(world_size)]
    return [
        "starting", "reaching the store", "forming the group", "a barrier", "all-reduces of 1 float",
        "all-reduces of 64 MiB", *pairs, "shared memory", "the end",
    ]  # fmt: skip


def measure(place: Place, connect: Callable[[], dist.Store], arrive: Callable[[str], None]) -> dict[str, Any]:
    """Called on all ranks. ``arrive`` is called at each of :func:`steps_of`; ``connect`` leads to the common store.

    Blocks until all ranks have come so far. Returns times of this rank in seconds, and of the pairs it began.
    """
    if place.backend == "nccl":
        torch.cuda.set_device(place.device)
    _keep_to_loopback(place)
    arrive("reaching the store")
    store = connect()
    arrive("forming the group")
    began = time.perf_counter()
    dist.init_process_group(
        place.backend,
        store=dist.PrefixStore("doctor", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=place.timeout,
        device_id=place.device if place.backend == "nccl" else None,
    )
    arrive("a barrier")
    dist.barrier()
    result: dict[str, Any] = {"form_s": time.perf_counter() - began, **_all_reduces(place, arrive)}
    result["pairs"] = {f"{a}-{b}": t for a, b in pairs_of(place.world_size) if (t := _pair(place, a, b, arrive))}
    arrive("shared memory")
    if place.backend == "gloo" and place.is_one_host and place.world_size > 1:
        group = dist.group.WORLD
        assert group is not None
        result["obstacle_to_sharing"] = obstacle_to_sharing(group, [torch.empty(RESNET50_BYTES // 4)])
    arrive("the end")
    _leave_last(place, store)
    return result


def _keep_to_loopback(place: Place) -> None:
    """Unless the user has named an interface: on one host nothing needs to be reached from elsewhere."""
    if place.is_one_host:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


def _all_reduces(place: Place, arrive: Callable[[str], None]) -> dict[str, float]:
    arrive("all-reduces of 1 float")
    small, large = (torch.zeros(num_bytes // 4, device=place.device) for num_bytes in (4, LARGE_BYTES))
    _times(lambda: dist.all_reduce(small), _NUM_WARM_UP, place)
    latency = median(_times(lambda: dist.all_reduce(small), _NUM_SMALL, place))
    arrive("all-reduces of 64 MiB")
    dist.all_reduce(large)
    return {
        "all_reduce_s": latency,
        "all_reduce_large_s": min(_times(lambda: dist.all_reduce(large), _NUM_LARGE, place)),
    }


def _pair(place: Place, a: int, b: int, arrive: Callable[[str], None]) -> tuple[float, float] | None:
    """One way between ``a`` and ``b``: seconds of 1 float, bytes per second of many; None unless this is ``a``."""
    arrive(f"ranks {a} and {b} talking")
    result = None
    if place.rank in (a, b):
        small, large = (torch.zeros(num_bytes // 4, device=place.device) for num_bytes in (4, _PAIR_BYTES))
        _exchange(small, place.rank, a, b)
        latency = median(_times(lambda: _exchange(small, place.rank, a, b), _NUM_SMALL, place)) / 2
        _exchange(large, place.rank, a, b)
        seconds = min(_times(lambda: _exchange(large, place.rank, a, b), _NUM_LARGE, place)) / 2
        result = (latency, _PAIR_BYTES / seconds) if place.rank == a else None
    dist.barrier()  # pairs take turns
    return result


def _exchange(tensor: torch.Tensor, rank: int, a: int, b: int) -> None:
    """From ``a`` to ``b`` and back."""
    if rank == a:
        dist.send(tensor, b)
        dist.recv(tensor, b)
    else:
        dist.recv(tensor, a)
        dist.send(tensor, a)


def _times(action: Callable[[], object], count: int, place: Place) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        if place.backend == "nccl":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def _leave_last(place: Place, store: dist.Store) -> None:
    """Rank 0, which may host the store, waits until the others need it no longer."""
    store.set(f"doctor done {place.rank}", "")
    if place.rank == 0:
        store.wait([f"doctor done {rank}" for rank in range(place.world_size)], place.timeout)
