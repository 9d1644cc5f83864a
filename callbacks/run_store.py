"""The store that all processes of a run share, whatever the strategy, and what ranks tell each other through it."""

from __future__ import annotations

import contextlib
import itertools
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

_READING = timedelta(seconds=5)
_PAUSE_S = 0.02
"""How often to look for ranks that may be lost instead of coming."""
_num_exchanges = itertools.count()
"""All ranks take part in the same ones, so the counts agree."""


def run_store(strategy: Any) -> dist.Store:
    """That of our strategies, else of the default process group; one of its own in a run of a single process."""
    if (store := getattr(strategy, "store", None)) is not None:
        return store
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()


def exchange(trainer: pl.Trainer, text: str, patience: timedelta, topic: str | None = None) -> dict[int, str]:
    """What every training rank says, by rank; lost ones, and those that have not come when patience ends, are left out.

    Called on all ranks in the same order, blocks. No collective takes part, so it may be called where ranks are not
    sure to be in step. ``topic``: comes once in a run; where processes may join a run, they have to name it.
    """
    name = topic if topic and may_lose_workers(trainer.strategy) else next(_num_exchanges)
    store = dist.PrefixStore(f"exchange/{name}", run_store(trainer.strategy))
    keys = {rank: str(rank) for rank in range(trainer.world_size)}
    store.set(keys[trainer.global_rank], text)
    _await(trainer.strategy, store, keys, patience)
    keys = {rank: key for rank, key in keys.items() if store.check([key])}
    said = {rank: store.get(key).decode() for rank, key in keys.items()}
    if trainer.global_rank > 0:
        store.set(f"read by {trainer.global_rank}", "")
    else:  # the store may end with this process: let the others read first
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.wait([f"read by {rank}" for rank in keys if rank > 0], _READING)
    return said


def _await(strategy: Any, store: dist.Store, keys: dict[int, str], patience: timedelta) -> None:
    """Block until all keys of ranks that are not lost are there, or patience has ended."""
    if not may_lose_workers(strategy):
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.wait(list(keys.values()), patience)
        return
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        lost = lost_ranks(strategy)
        if store.check([key for rank, key in keys.items() if rank not in lost]):
            return
        time.sleep(_PAUSE_S)


def lost_ranks(strategy: Any) -> set[int]:
    """Training ranks that the run has gone on without."""
    return strategy.lost_ranks() if may_lose_workers(strategy) else set()


def may_lose_workers(strategy: Any) -> bool:
    """Whether the run goes on without ranks that are lost."""
    return getattr(strategy, "workers_may_be_lost", False)


def in_lockstep(strategy: Any) -> bool:
    """Whether all training ranks take part in every step, so that it may hold collectives."""
    return getattr(strategy, "in_lockstep", True)


def steps_together(strategy: Any) -> bool:
    """Whether all training ranks that are there take part in every step: whoever ends earlier is waited for."""
    return getattr(strategy, "steps_together", in_lockstep(strategy))
