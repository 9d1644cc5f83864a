"""Freed memory stays with the process, unless the user has said otherwise."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Any

import pytest
import torch
from distributed import run_distributed

from gradsync.comm.memory import keep_freed_memory

MIB = 1024 * 1024
NUM_MIB = 64


def _faults() -> int:
    """Page faults of taking, filling and freeing 64 MiB in pieces, once that has been done before."""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(MIB // 4) for _ in range(NUM_MIB)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _faults_before_and_after(rank: int) -> Any:
    libc = ctypes.CDLL(None)
    for name in (
        -1,
        -3,
    ):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD as in a new process; what ran before may have moved them
        libc.mallopt(name, 128 * 1024)
    before = _faults()
    return keep_freed_memory(), before, _faults()


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    pages = NUM_MIB * MIB // resource.getpagesize()
    [(kept, before, after)] = run_distributed(_faults_before_and_after, 1)
    assert kept
    assert before > pages / 2
    assert after < pages / 4


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_tuning_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, name, "1")
    assert not keep_freed_memory()
