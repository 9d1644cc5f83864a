"""The ranks of one host, meeting in shared memory.

Every rank has a segment that all others map: its *inbox* (semaphores that the others post) and its *arena* (tensors).
A rank writes to its own arena, rings, and reads from the others' when they have rung.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from ..agreement import all_gather_bytes
from ..hosts import hosts_of
from . import semaphore
from .segment import Segment, SharedMemoryError

NUM_BELLS = 4
"""Rings of different bells are counted apart, so that phases of several operations may overlap."""

_SLICE_S = 0.2
"""How long a rank waits before it looks whether its peers are alive."""

ALIGNMENT = 64
"""Of tensors in an arena, in bytes: a cache line, and the widest vector registers."""


class PeerLost(RuntimeError):
    """A rank of this host has ended, or does not come."""


@final
class HostGroup:
    """Called on all ranks of ``group`` in the same order, which must be on one host; construction blocks.

    Args:
        group: Used at construction only.
        num_bytes: Size of the arena.
        timeout_s: How long :meth:`wait` waits for a peer that is alive.

    Raises:
        SharedMemoryError: on all ranks alike, with the reason of the first that cannot.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, timeout_s: float) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout_s = timeout_s
        self._inbox_bytes = (NUM_BELLS * self.size + 1) * semaphore.SEMAPHORE_BYTES
        self._closed = False
        self._lost: str | None = None
        self.num_bytes = num_bytes
        if len(set(hosts_of(group))) > 1:
            raise SharedMemoryError("the ranks are not all on one host")
        self._lives: list[int] = []
        mine, handle = self._make()
        try:
            handles = _unless_failed(group, handle)
            self._pids = [handle["pid"] for handle in handles]
            self._segments = self._attach(group, mine, handles)
        except BaseException:
            self._close_lives()
            raise
        finally:
            if mine is not None:
                mine.seal()  # also after another rank's failure: an open file keeps its memory

    def _make(self) -> tuple[Any, dict[str, Any]]:
        try:
            mine = Segment.create(self._inbox_bytes + self.num_bytes, num_makers=self.size)
        except SharedMemoryError as error:
            return None, {"error": str(error)}
        for number in range(NUM_BELLS * self.size):
            semaphore.initialize(mine.address + number * semaphore.SEMAPHORE_BYTES)
        return mine, mine.handle()

    def _attach(self, group: dist.ProcessGroup, mine: Segment, handles: list[dict[str, Any]]) -> list[Segment]:
        segments, outcome = [], {}
        try:
            segments = [mine if r == self.rank else Segment.attach(handle) for r, handle in enumerate(handles)]
            for pid in self._pids:
                self._lives.append(os.pidfd_open(pid))  # readable when the process has ended
        except (SharedMemoryError, OSError) as error:
            outcome = {"error": str(error)}
        _unless_failed(group, outcome)
        return segments

    def tensor(self, rank: int, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """1-D view of ``rank``'s arena from byte ``start``, a multiple of :data:`ALIGNMENT`."""
        return self._segments[rank].tensor(self._inbox_bytes + start, numel, dtype)

    # -- meeting ---------------------------------------------------------------------------------------------

    def ring(self, bell: int) -> None:
        """Tell all others that this rank has come so far; what it wrote before is visible to them."""
        for peer in self._peers():
            semaphore.post(self._semaphore(peer, bell, sender=self.rank))

    def wait(self, bell: int) -> None:
        """Block until every other rank has rung ``bell`` as often as this rank waited for it.

        Raises:
            PeerLost: a peer has ended, has closed, or does not come in time. From then on every call raises it:
                a late ring would be counted for the next operation.
        """
        if self._lost is not None:
            raise PeerLost(self._lost)
        try:
            for peer in self._peers():
                self._wait_for(peer, bell)
        except PeerLost as lost:
            self._lost = str(lost)
            raise

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _semaphore(self, owner: int, bell: int, sender: int) -> int:
        return self._segments[owner].address + (bell * self.size + sender) * semaphore.SEMAPHORE_BYTES

    def _wait_for(self, peer: int, bell: int) -> None:
        address = self._semaphore(self.rank, bell, sender=peer)
        deadline = time.monotonic() + self._timeout_s
        while not semaphore.wait(address, _SLICE_S):
            has_ended = self._has_ended(peer)
            if self._closed:  # looked at afterwards: from then on the files that tell of peers are others
                raise PeerLost("this rank has closed its shared memory")
            if has_ended:
                if semaphore.wait(address, 0):  # it rang, then ended
                    return
                raise PeerLost(f"rank {peer} (process {self._pids[peer]}) has ended: connection closed by peer")
            if time.monotonic() > deadline:
                raise PeerLost(f"rank {peer} (process {self._pids[peer]}) timed out after {self._timeout_s:g} s")

    def _has_ended(self, peer: int) -> bool:
        life = select.poll()  # select() takes no file number above 1023
        life.register(self._lives[peer], select.POLLIN)
        return bool(self._flag(peer)[0]) or bool(life.poll(0))

    def _flag(self, rank: int) -> Tensor:
        """Set by a rank that has closed, though its process may live on for a while."""
        return self._segments[rank].tensor(NUM_BELLS * self.size * semaphore.SEMAPHORE_BYTES, 1, torch.uint8)

    def close(self) -> None:
        """Let go, waiting for nobody. Peers that wait for this rank get an error within a second."""
        if not self._closed:
            self._closed = True
            self._flag(self.rank).fill_(1)
            self._close_lives()

    def _close_lives(self) -> None:
        for life in self._lives:
            with contextlib.suppress(OSError):
                os.close(life)


def _unless_failed(group: dist.ProcessGroup, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's dictionary. Raises SharedMemoryError if one of them reports an error."""
    everyone = [json.loads(data) for data in all_gather_bytes(json.dumps(mine).encode(), group)]
    for rank, other in enumerate(everyone):
        if "error" in other:
            raise SharedMemoryError(f"rank {rank}: {other['error']}")
    return everyone
