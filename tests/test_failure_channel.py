"""What fails on one host is told on the others: two commands here, as two hosts would run them."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import Ended, run_command, tiny_fit
from distributed import free_port


def _two_hosts(folder: Path, strategy: str, devices: int, faulty: int, **faults: object) -> list[Ended]:
    """What both commands came to; the faults are those of host ``faulty``."""
    address = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]

    def run(host: int) -> Ended:
        fit = tiny_fit(strategy, devices, **(faults if host == faulty else {}))
        command = ["env", f"NODE_RANK={host}", *address, sys.executable, "-m", "gradsync", *fit]
        (folder / str(host)).mkdir()
        return run_command([*command, "--trainer.num_nodes", "2"], folder / str(host))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, range(2)))


def _said(ended: Ended) -> list[str]:
    return [line for line in ended.output.splitlines() if line.startswith("gradsync: ")]


def _assert_ended(ended: list[Ended]) -> None:
    for one in ended:
        assert one.code not in (0, None), one.output
        assert not one.orphans


def test_without_a_fault_both_end_well(tmp_path: Path) -> None:
    for one in _two_hosts(tmp_path, "manual_allreduce", 1, faulty=0):
        assert one.code == 0, one.output
        assert not _said(one)


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "sharded_server"])
def test_an_exception_is_told_on_the_other_host(strategy: str, tmp_path: Path) -> None:
    ended = _two_hosts(tmp_path, strategy, 1, faulty=1, fault="raise", process=0)
    _assert_ended(ended)
    here = socket.gethostname()
    assert _said(ended[0]) == [f"gradsync: error: rank 1 on {here}: ArithmeticError: boom in training"], ended[0].output
    assert "Traceback" not in ended[0].output


def test_a_killed_process_is_told_on_the_other_host(tmp_path: Path) -> None:
    ended = _two_hosts(tmp_path, "manual_allreduce", 2, faulty=1, fault="kill", process=1, at_step=1)
    _assert_ended(ended)
    told = "process 1 on {}: was killed by SIGKILL (the kernel does so where memory is short)"
    assert _said(ended[0]) == [f"gradsync: error: {told.format(socket.gethostname())}"], ended[0].output


@pytest.mark.parametrize("faulty", [0, 1])
def test_where_nobody_is_left_to_tell_silence_does(faulty: int, tmp_path: Path) -> None:
    ended = _two_hosts(tmp_path, "manual_allreduce", 1, faulty=faulty, fault="kill", process=0, at_step=1)
    _assert_ended(ended)
    (said,) = _said(ended[1 - faulty])
    assert said.startswith(f"gradsync: error: rank {faulty}"), said
    assert "gone without a word" in said
