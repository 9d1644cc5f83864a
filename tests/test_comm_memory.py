"""Freed memory stays with the process, unless the user has said otherwise."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
from commands import run_command

from gradsync.comm.memory import keep_freed_memory

CODE = """
import ctypes, resource
import torch
from gradsync.comm.memory import keep_freed_memory

for name in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD at their first values, which imports may have moved
    ctypes.CDLL(None).mallopt(name, 128 * 1024)

def faults():
    # of taking, filling and freeing 64 MiB in pieces, once that has been done before
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(2**18) for _ in range(64)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


def test_memory_that_was_freed_is_used_again_without_page_faults(tmp_path: Path) -> None:
    """In a process of its own: one in which much was freed already has room between what it holds."""
    ended = run_command([sys.executable, "-c", CODE], tmp_path)
    before, kept, after = ended.output.split()
    pages = 64 * 2**20 // resource.getpagesize()
    assert kept == "True"
    assert int(before) > pages / 2
    assert int(after) < pages / 4


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_tuning_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, name, "1")
    assert not keep_freed_memory()
