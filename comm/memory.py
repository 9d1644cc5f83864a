"""How this process's C library treats freed memory."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_TOP_PAD_BYTES = 64 * 1024 * 1024
_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024  # the most that glibc takes


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the rest of the process; False without glibc or where the user has tuned it.

    When gradients are copied into buckets and freed during the backward pass, nothing holds the top of the heap any
    more: glibc gives the freed activations back to the kernel, and every forward pass faults them in again, under DDP
    too: benchmarks/step.py shows page faults per step, and DDP with this setting in the row ddp_keeping_memory.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = ((_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES), (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES))
    accepted = [mallopt(name, value) for name, value in settings]
    return all(accepted)
