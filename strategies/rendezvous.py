"""Where the processes of a parameter-server run find each other: one store, hosted by the server."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..errors import UserError

_stores: dict[tuple[str, int], dist.TCPStore] = {}
"""One per address for the life of the process: several fits in a row meet at the same port."""

_num_runs = itertools.count(1)
"""Every process of a script takes part in the same runs, so the counts agree."""

_LOOPBACK = {"localhost", "127.0.0.1"}
_MAX_IPC_PATH = 80
"""Unix socket paths hold 107 characters; the folder's and the socket's names come on top."""


def connect_store(address: str, port: int, is_server: bool, timeout: timedelta) -> tuple[dist.Store, dist.Store]:
    """The stores of all runs, and of this run, at ``address:port``.

    The server hosts them, unless torchrun's agent already does. Called once per run by every process.

    Raises:
        UserError: the port is taken, or nobody answers in time.
    """
    key = (address, port)
    if key not in _stores:
        hosts = is_server and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            _stores[key] = dist.TCPStore(
                address,
                port,
                is_master=hosts,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=_listen(port) if hosts and address in _LOOPBACK else None,
            )
        except (OSError, dist.DistError, RuntimeError) as error:
            what = f"port {port} is taken" if hosts else "the parameter server does not answer"
            raise UserError(
                f"processes cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): {what} ({error})"
            ) from error
    # each torchrun attempt starts afresh: keys of the one before would lead to sockets that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = dist.PrefixStore(f"gradsync/{attempt}", _stores[key])
    return shared, dist.PrefixStore(f"run {next(_num_runs)}", shared)


def _listen(port: int) -> int:
    """A bound socket on loopback: TCPStore by itself would listen on all interfaces."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.close()
        raise
    listener.listen(128)
    return listener.detach()


def make_socket_folder() -> Path:
    """A folder only this user may enter, for a Unix socket."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="gradsync-", dir=base if len(base) < _MAX_IPC_PATH else "/tmp"))


def remove_socket_folder(endpoint: str) -> None:
    """Remove the folder of an ``ipc://`` endpoint; both sides do, whoever is left."""
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(OSError):
            shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent)
