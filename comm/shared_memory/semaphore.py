"""POSIX semaphores in memory that several processes map: a waiting thread sleeps in the kernel, it never polls."""

from __future__ import annotations

import ctypes
import errno
import os
import time

SEMAPHORE_BYTES = 64
"""Room for one: a ``sem_t`` has at most 32 bytes on 64-bit Linux (glibc, musl); a cache line each."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


for _name, _arguments in (
    ("sem_init", [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]),
    ("sem_post", [ctypes.c_void_p]),
    ("sem_trywait", [ctypes.c_void_p]),
    ("sem_timedwait", [ctypes.c_void_p, ctypes.POINTER(_Timespec)]),
):
    getattr(_libc, _name).argtypes = _arguments


def initialize(address: int) -> None:
    """Make a semaphore of count 0 at ``address``, for use by other processes too."""
    if _libc.sem_init(address, 1, 0) != 0:
        raise OSError(ctypes.get_errno(), "sem_init failed")


def post(address: int) -> None:
    """Count one up, and wake a waiter. What this process wrote before is visible to whoever it wakes."""
    if _libc.sem_post(address) != 0:
        raise OSError(ctypes.get_errno(), "sem_post failed")


def wait(address: int, timeout_s: float) -> bool:
    """Count one down; blocks, without the GIL, while the count is 0. False if it still is after ``timeout_s``."""
    if _libc.sem_trywait(address) == 0:
        return True
    until = time.time() + timeout_s  # sem_timedwait knows the wall clock only; callers wait in short slices
    limit = _Timespec(int(until), int(until % 1 * 1e9))
    while _libc.sem_timedwait(address, ctypes.byref(limit)) != 0:
        code = ctypes.get_errno()
        if code == errno.ETIMEDOUT:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
