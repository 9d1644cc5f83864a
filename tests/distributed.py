"""Start ranks for a test: forked from this process, which has loaded torch and Lightning (about 1 s a trial)."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RankFailed(AssertionError):
    """At least one rank raised, exited non-zero or did not end in time; the message holds every rank's output."""


_BELOW_EPHEMERAL = range(20_000, 32_000)
"""The kernel gives none of these to a connection that asks for any, as it may do between here and the port's use."""
_ports = iter(random.SystemRandom().sample(_BELOW_EPHEMERAL, len(_BELOW_EPHEMERAL)))


def free_port() -> int:
    """One that nobody uses, another each time."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Rank:
    """One that has ended, or was killed when the time was over: code None."""

    code: int | None
    output: str
    result: Any


def _child(
    fn: Callable[..., Any],
    rank: int,
    args: tuple[Any, ...],
    env: dict[str, str],
    folder: Path,
    enter: Callable[[int], dict[str, str]] | None,
) -> None:
    """Body of one rank: never returns into pytest."""
    code = 1
    try:
        os.setsid()
        output = os.open(folder / f"out_{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(env)
        if enter is not None:
            os.environ.update(enter(rank))
        import torch

        torch.set_num_threads(1)
        result = fn(rank, *args)
        (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # interpreter teardown of a process with torch takes seconds


def _wait(pids: dict[int, int], deadline: float) -> dict[int, int | None]:
    """Exit code per rank; None for one that had to be killed at the deadline."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for rank in pids.keys() - codes.keys():
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank in pids.keys() - codes.keys():
        codes[rank] = None
    for rank, pid in pids.items():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # also whatever the rank started
        if codes[rank] is None:
            os.waitpid(pid, 0)
    return codes


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100, killed: Collection[int] = ()
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` processes of one gloo world; return the results in rank order.

    Ranks in ``killed`` end by SIGKILL, and have None for a result.

    Raises:
        RankFailed: with the output of every rank, as soon as all have ended or the time is over.
    """
    ranks = run_ranks(fn, world_size, *args, timeout_s=timeout_s)
    codes = {number: rank.code for number, rank in enumerate(ranks)}
    if codes != {number: -signal.SIGKILL if number in killed else 0 for number in codes}:
        outputs = "\n".join(f"[rank {n}] {line}" for n, rank in enumerate(ranks) for line in rank.output.splitlines())
        raise RankFailed(f"exit codes {codes} (None: killed after {timeout_s} s)\n{outputs}")
    return [rank.result for rank in ranks]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 100,
    enter: Callable[[int], dict[str, str]] | None = None,
) -> list[Rank]:
    """The same, whatever becomes of them. ``enter(rank)``: called first in each, returns more of its environment."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="gradsync-test-") as name:
        folder = Path(name)
        pids: dict[int, int] = {}
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, args, _environment(rank, world_size, port), folder, enter)
            pids[rank] = pid
        codes = _wait(pids, time.monotonic() + timeout_s)
        return [Rank(codes[rank], _output(folder, rank), _result(folder, rank)) for rank in range(world_size)]


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result_{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _output(folder: Path, rank: int) -> str:
    path = folder / f"out_{rank}"
    return path.read_text(errors="replace") if path.exists() else ""
