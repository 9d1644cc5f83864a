"""Whose ``time.perf_counter_ns`` can be compared with whose, and by how much two hosts' differ.

On Linux that clock is CLOCK_MONOTONIC, one for all processes of a booted kernel (and of a time namespace). Between
hosts the difference is estimated by pings through a store (Cristian, "Probabilistic clock synchronization", 1989):
a rank reads its clock, asks, gets the reference's reading, reads its clock again; the reference read its own somewhere
in between. Taking the middle is off by at most half the round trip, and the shortest of several counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch.distributed as dist

_NUM_PINGS = 16


@final
@dataclass(frozen=True)
class ClockOffset:
    """What to add to this process's stamps to get those of the reference."""

    offset_ns: int
    accuracy_ns: int
    """The true offset is at most so far away, when it was measured; clocks drift apart by microseconds per second."""


SAME_CLOCK = ClockOffset(0, 0)


def clock_id() -> str:
    """Equal in two processes if their clocks are one."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/time")
    return f"{boot.read_text().strip()} {os.readlink(namespace) if namespace.exists() else ''}"


def align_clocks(
    store: dist.Store,
    rank: int,
    world_size: int,
    identity: str | None = None,
    read_ns: Callable[[], int] = time.perf_counter_ns,
) -> ClockOffset:
    """This rank's offset to rank 0's clock. Called on all ranks at about the same time; blocks; once per ``store``.

    Args:
        store: Nobody else uses its keys.
        rank: This one's.
        world_size: How many take part.
        identity: Of this rank's clock, :func:`clock_id` by default.
        read_ns: The clock.
    """
    identity = identity or clock_id()
    store.set(f"identity {rank}", identity)
    if rank == 0:
        others = (other for other in range(1, world_size) if store.get(f"identity {other}").decode() != identity)
        _answer(store, others, read_ns)
        return SAME_CLOCK
    if store.get("identity 0").decode() == identity:
        return SAME_CLOCK
    return _ask(store, rank, read_ns)


def _answer(store: dist.Store, ranks: Iterable[int], read_ns: Callable[[], int]) -> None:
    for rank in ranks:
        store.set(f"turn {rank}", "")  # a ping that waited for its turn would say little
        for number in range(_NUM_PINGS):
            store.get(f"ping {rank} {number}")
            store.set(f"pong {rank} {number}", str(read_ns()))


def _ask(store: dist.Store, rank: int, read_ns: Callable[[], int]) -> ClockOffset:
    store.get(f"turn {rank}")
    estimates = []
    for number in range(_NUM_PINGS):
        before_ns = read_ns()
        store.set(f"ping {rank} {number}", "")
        theirs_ns = int(store.get(f"pong {rank} {number}"))
        after_ns = read_ns()
        half_ns = (after_ns - before_ns + 1) // 2
        estimates.append(ClockOffset(theirs_ns - before_ns - half_ns, half_ns))
    return min(estimates, key=lambda estimate: estimate.accuracy_ns)
