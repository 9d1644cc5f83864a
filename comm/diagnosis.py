"""Turns what a backend raises when a peer is gone or late into a sentence that names the peer."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import torch.distributed as dist

_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|connection was likely closed",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)
_ROLL_CALL_S = 2.0
_standing: dict[str, str] = {}


def stand(**where: str) -> None:
    """Note what this process is at, in place of what was noted under the same names: a hang is reported with it."""
    _standing.update(where)


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank has gone: then that rank's error is the true one."""
    return isinstance(error, (RuntimeError, dist.DistError)) and says_lost_peer(str(error))


def says_lost_peer(text: str) -> bool:
    """The same of an error that another process has passed on."""
    return bool(_LOST.search(text))


def is_timeout(error: BaseException) -> bool:
    """Whether ``error`` says that another rank did not come in time."""
    return isinstance(error, (RuntimeError, dist.DistError)) and bool(_LATE.search(str(error)))


def missing_ranks() -> list[int] | None:
    """Ranks of the default group that do not answer a roll call within two seconds; None if it cannot be held.

    Called by every rank whose collective timed out; takes about two seconds. The call goes over the group's
    store, not over the collectives, of which one is stuck.
    """
    if not dist.is_initialized():
        return None
    missing: list[list[int]] = []
    # The store itself may not answer: where the link to its host is cut, a read waits long.
    thread = threading.Thread(target=lambda: missing.append(_roll_call()), name="roll call", daemon=True)
    thread.start()
    thread.join(2 * _ROLL_CALL_S)
    return missing[0] if missing else [0]


def _roll_call() -> list[int]:
    try:
        store = dist.PrefixStore("gradsync_roll_call", dist.distributed_c10d._get_default_store())
        store.set_timeout(timedelta(seconds=_ROLL_CALL_S))
        store.set(str(dist.get_rank()), "here")
        time.sleep(_ROLL_CALL_S)
        return [rank for rank in range(dist.get_world_size()) if not store.check([str(rank)])]
    except (RuntimeError, dist.DistError):
        return [0]  # the store lives in rank 0's process: it is that one which does not answer


def explain_timeout(remedy: str) -> str:
    """One sentence: which rank is missing, where this one stands, and what raises the limit (``remedy``)."""
    missing = missing_ranks()
    who = f"rank(s) {', '.join(map(str, missing))} did not take part" if missing else "no rank is missing, all are late"
    here = f" (this one waits in {', '.join(f'{k} {v}' for k, v in _standing.items())})" if _standing else ""
    return f"communication timed out: {who}{here}; {remedy}"
