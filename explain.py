"""What people run into, in one line each, with the flag that helps."""

from __future__ import annotations

import errno
import re

import torch

from .comm.diagnosis import explain_timeout, is_lost_peer, is_timeout
from .comm.hooks import BadHook
from .comm.server import ServerFailed, WorkerFailed
from .comm.sharded import Unshardable
from .comm.shared_memory import SharedMemoryError
from .errors import UserError

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|DefaultCPUAllocator", re.IGNORECASE)

_PLAIN = (UserError, BadHook, SharedMemoryError, WorkerFailed, ServerFailed, Unshardable)

TIMEOUT_REMEDY = (
    "--trainer.strategy.step_timeout_s SECONDS raises the limit (under ddp: --trainer.strategy.timeout HH:MM:SS)"
)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def is_consequence(error: BaseException) -> bool:
    """Whether another process's failure caused this one."""
    return is_lost_peer(error) or isinstance(error, (WorkerFailed, ServerFailed))


def _plain(error: BaseException | None) -> BaseException | None:
    """The error worded for people that ``error`` is or was raised from: the argument parser wraps some."""
    while error is not None and not isinstance(error, _PLAIN):
        error = error.__cause__ or error.__context__
    return error


def _own_words(error: BaseException) -> str:
    """Its text, without the traceback that a loader process puts before it."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].rstrip()


def one_line(error: BaseException) -> str | None:
    """The error and its remedy in one line, None for one that needs its traceback.

    After a timeout it holds a roll call among the ranks, which takes two seconds.
    """
    if (plain := _plain(error)) is not None:
        return _own_words(plain)
    if is_out_of_memory(error):
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"out of memory: lower --data.batch_size, the batch of each process ({detail})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename2 or error.filename or "a disk"
        return f"no space left on {where}: free some, or write elsewhere with --run_dir DIR ({error.strerror})"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.filename or 'a disk'} cannot be written: write elsewhere with --run_dir DIR ({error.strerror})"
    if is_timeout(error):
        return explain_timeout(TIMEOUT_REMEDY)
    if is_lost_peer(error):
        return f"another process of the run has gone; its own error stands above or in its log ({error})"
    return None
