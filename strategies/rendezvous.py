"""Where the processes of a run find each other: one store, hosted by process 0."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import UserError
from ..processes import make_private_folder

_stores: dict[tuple[str, int], dist.TCPStore] = {}
"""One per address for the life of the process: several fits in a row meet at the same port."""

_num_runs = itertools.count(1)
"""Every process of a script takes part in the same runs, so the counts agree."""

_LOOPBACK = {"localhost", "127.0.0.1"}
_MAX_IPC_PATH = 60
"""Unix socket paths hold 107 characters; the folder's and the socket's names come on top."""


def connect_store(address: str, port: int, process_rank: int, timeout: timedelta) -> tuple[dist.Store, dist.Store]:
    """The stores of all runs, and of this run, at ``address:port``.

    Process 0 hosts them, unless torchrun's agent already does. Called once per run by every process.

    Raises:
        UserError: the port is taken, or nobody answers in time.
    """
    key = (address, port)
    if key not in _stores:
        hosts = process_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            _stores[key] = dist.TCPStore(
                address,
                port,
                is_master=hosts,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=_listen(address, port) if hosts else None,
            )
        except (OSError, dist.DistError, RuntimeError) as error:
            what = f"port {port} is taken" if hosts else f"process 0 did not answer within {timeout}"
            raise UserError(
                f"processes cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): {what} ({error})"
            ) from error
    # each torchrun attempt starts afresh: keys of the one before would lead to sockets that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = dist.PrefixStore(f"gradsync/{attempt}", _stores[key])
    return shared, dist.PrefixStore(f"run {next(_num_runs)}", shared)


def roll_call(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Block until all ranks have called.

    Raises:
        UserError: naming the ranks that did not come in time.
    """
    store.set(f"here {rank}", "")
    try:
        store.wait([f"here {other}" for other in range(world_size)], timeout)
    except (dist.DistError, RuntimeError) as error:
        missing = [other for other in range(world_size) if not store.check([f"here {other}"])]
        late = ", ".join(map(str, missing))
        raise UserError(
            f"rank(s) {late} did not arrive within {timeout.total_seconds():g} s of rank {rank}; "
            "--trainer.strategy.start_timeout_s raises the limit"
        ) from error


def start_default_group(
    shared: dist.Store, backend: str, rank: int, world_size: int, timeout: timedelta, device: torch.device
) -> None:
    """Form torch's default process group with the other ranks, unless this process has one already. Blocks.

    ``shared``: the store of all runs, see :func:`connect_store`.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default group", shared),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type != "cpu" else None,
    )
    atexit.register(_leave_default_group)


def _leave_default_group() -> None:
    """Join the group's threads while Python still runs.

    A thread of gloo may still hold the last tensor it sent. To drop it after Python's end aborts the process
    ("terminate called without an active exception"); NCCL warns.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _listen(address: str, port: int) -> int | None:
    """A bound socket on ``address``: TCPStore by itself would listen on all interfaces.

    None if that would not do: a host's own name may lead to loopback there and not on the others.
    """
    own = "127.0.0.1" if address in _LOOPBACK else _own_address(address)
    if own is None:
        return None
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((own, port))
    except OSError:
        listener.close()
        raise
    listener.listen(128)
    return listener.detach()


def _own_address(name: str) -> str | None:
    """What ``name`` stands for, if this host has that address and others can reach it."""
    try:
        own = socket.gethostbyname(name)
        with socket.socket() as attempt:
            attempt.bind((own, 0))
    except OSError:
        return None
    return None if own.startswith("127.") else own


def make_socket_folder() -> Path:
    """A folder only this user may enter, for a Unix socket."""
    return make_private_folder("server", max_path=_MAX_IPC_PATH)


def remove_socket_folder(endpoint: str) -> None:
    """Remove the folder of an ``ipc://`` endpoint; both sides do, whoever is left."""
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(OSError):
            shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent)
