"""Agreeing on where to stop: any process may ask at any time, all training ranks stop after the same step.

Phases, each a key in the store of the run:

1. *asked*: a process has got a signal;
2. *decided*: rank 0 has seen that at the end of a step, and named the step after which all stop;
3. *saved*: rank 0 has saved what there is to save, and ranks may leave.

No collective takes part, so nothing can wait for a rank that is waiting for a signal's handler
(https://github.com/Lightning-AI/pytorch-lightning/issues/20806 and its like).
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import final

import torch.distributed as dist

_ASKED, _DECIDED, _SAVED = "asked", "decided", "saved"


@final
class StopAgreement:
    """Of one process. Every call but :meth:`await_saved` takes one or two round trips to the store.

    Args:
        store: Of the run; a connection of its own is made.
        rank: Among the training ranks; None for a process that does not train.
        margin: Ranks that exchange gradients in every step can be so many steps ahead of rank 0, when this one ends a
            step. None if they go at paces of their own: then each stops at the end of its step.
    """

    def __init__(self, store: dist.Store, rank: int | None, margin: int | None) -> None:
        self._store = dist.PrefixStore("stop", store.clone())
        self._rank = rank
        self._margin = margin

    def ask(self, signum: int) -> None:
        """Any process, any thread."""
        self._store.set(_ASKED, str(signum))

    def due(self, step: int) -> int | None:
        """Training ranks, at the end of every step, counted alike on all: the signal if this was the last one.

        None if the store has gone: then whoever hosted it has, and that is for others to tell.
        """
        with contextlib.suppress(dist.DistError):
            return self._due(step)
        return None

    def _due(self, step: int) -> int | None:
        if self._rank == 0 and not self._store.check([_DECIDED]) and self._store.check([_ASKED]):
            last = 0 if self._margin is None else step + self._margin
            self._store.set(_DECIDED, f"{last} {int(self._store.get(_ASKED))}")
        if not self._store.check([_DECIDED]):
            return None
        last, signum = map(int, self._store.get(_DECIDED).split())
        return signum if step >= last else None

    def decided(self) -> int | None:
        """The signal for which all stop, None if none is to."""
        return int(self._store.get(_DECIDED).split()[1]) if self._store.check([_DECIDED]) else None

    def saved(self) -> None:
        """Rank 0, when all is saved."""
        self._store.set(_SAVED, "yes")

    def await_saved(self, patience: timedelta) -> None:
        """The others; returns in any case, since rank 0 may have ended the store as well."""
        with contextlib.suppress(dist.DistError):
            self._store.wait([_SAVED], patience)
