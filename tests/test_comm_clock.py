"""Clocks of one host are one; between hosts the estimate is as good as it says."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch.distributed as dist

from gradsync.comm.clock import SAME_CLOCK, ClockOffset, align_clocks, clock_id


def test_the_clock_is_the_kernels_and_the_same_in_every_process() -> None:
    assert time.get_clock_info("perf_counter").implementation == "clock_gettime(CLOCK_MONOTONIC)"
    read, write = os.pipe()
    before = time.perf_counter_ns()
    if (pid := os.fork()) == 0:
        os.write(write, f"{time.perf_counter_ns()} {clock_id()}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    stamp, identity = os.read(read, 1000).decode().split(" ", 1)
    assert before < int(stamp) < time.perf_counter_ns()
    assert identity == clock_id()


def _align(offsets_ns: list[int], identities: list[str]) -> list[ClockOffset]:
    """Every rank in a thread, with a clock that is ahead of the true one."""
    store, found = dist.HashStore(), [SAME_CLOCK] * len(offsets_ns)

    def rank_does(rank: int) -> None:
        found[rank] = align_clocks(
            store, rank, len(offsets_ns), identities[rank], lambda: time.perf_counter_ns() + offsets_ns[rank]
        )

    threads = [threading.Thread(target=rank_does, args=(rank,)) for rank in range(len(offsets_ns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("ahead_ns", [0, 10**15, -(10**9)])
def test_the_estimate_is_within_its_accuracy(ahead_ns: int) -> None:
    first, same, other, another = _align([0, 0, ahead_ns, -ahead_ns], ["a", "a", "b", "c"])
    assert first == same == SAME_CLOCK
    for found, truth in ((other, -ahead_ns), (another, ahead_ns)):
        assert abs(found.offset_ns - truth) <= found.accuracy_ns < 10**9
