"""Errors of the machine, in one line with a remedy."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from gradsync.errors import UserError
from gradsync.explain import is_consequence, one_line
from gradsync.lightning_cli import _check_writable


def test_a_full_disk_is_told_with_the_flag_that_helps() -> None:
    with pytest.raises(OSError, match="No space") as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"checkpoint")
    line = one_line(caught.value)
    assert line is not None
    assert line.startswith("no space left on ")
    assert "--run_dir" in line


def test_an_error_that_nobody_knows_keeps_its_traceback() -> None:
    assert one_line(ArithmeticError("boom")) is None


def test_an_error_of_a_loader_process_has_no_traceback() -> None:
    class Damaged(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            raise UserError("cannot read the image x.jpg\nMend it")

        def __len__(self) -> int:
            return 1

    with pytest.raises(UserError) as caught:
        list(DataLoader(Damaged(), num_workers=1))
    error = caught.value
    del caught  # whose frames hold the loader, and that its process
    error.__traceback__ = None
    gc.collect()
    assert "Traceback" in str(error)
    assert one_line(error) == "cannot read the image x.jpg\nMend it"


def test_a_run_folder_that_cannot_be_written_is_found_before_anything_else() -> None:
    with pytest.raises(UserError, match="--run_dir"):
        _check_writable(Path("/proc/nowhere"))


def test_a_store_that_went_with_its_host_is_a_lost_peer() -> None:
    (port, told), (connected, tell) = os.pipe(), os.pipe()
    if (host := os.fork()) == 0:
        served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(told, str(served.port).encode())
        os.read(connected, 1)
        time.sleep(0.3)  # most often the other waits by now; it may as well ask one that has gone
        os._exit(1)
    store = dist.TCPStore("127.0.0.1", int(os.read(port, 16)), is_master=False, wait_for_workers=False)
    os.write(tell, b".")
    with pytest.raises(dist.DistError) as caught:
        store.wait(["never"], timedelta(seconds=60))
    os.waitpid(host, 0)
    assert is_consequence(caught.value)
