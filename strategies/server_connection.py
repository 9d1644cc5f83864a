"""What ties a process to the others of one run of the parameter server, beside the store: sockets, peers, a watch."""

from __future__ import annotations

import json
import os
import socket as sockets
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch.distributed as dist
import zmq

from ..comm.hosts import host_identity
from ..comm.server.authenticator import Authenticator
from ..comm.server.collective import CollectivePeers
from ..comm.server.links import DealerLink, RouterLink
from ..comm.server.naive import NaivePeers
from ..comm.server.peers import Peers
from ..errors import UserError
from ..keys import load_keys
from ..processes import is_supervised
from .rendezvous import make_socket_folder, remove_socket_folder
from .server_watch import ServerWatch

_HANDSHAKE_MS = 5000
"""How long a connection may take for ZeroMQ's handshake; the rest is in :mod:`..comm.server.gate`."""
_SILENT_MS = 5000
"""A connection to another host is given up, and made anew, when that has not acknowledged anything for so long."""
_CONNECT_MS = 1000
"""Then it is tried so often: TCP by itself would try less and less often, and be late when the link is healed."""


@final
class ServerConnection:
    """Made after the processes were started: a ZeroMQ context does not survive a fork.

    Args:
        store: Of this run.
        process_rank: Among all processes, of which the first are the servers.
        num_servers: How many they are.
        keys: Folder of the keys by which they know each other, if they do.

    Attributes:
        sockets: Of a server the only one (ROUTER); of a worker one per server (DEALER).
        peers: What moves gradients and parameters if the sockets do not.
    """

    def __init__(self, store: dist.Store, process_rank: int, num_servers: int, keys: Path | None = None) -> None:
        self._store = store
        self._process_rank = process_rank
        self._num_servers = num_servers
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[Any] = []
        self._links: list[DealerLink | RouterLink] = []
        self.peers: Peers | None = None
        self._endpoints: list[str] = []
        self._keys = keys
        self._authenticator: Authenticator | None = None
        self._watch: ServerWatch | None = None

    def bind(self, over_tcp: bool, host: str, num_workers: int) -> None:
        """Server: listen on ``host``, or on a Unix socket in a private folder, and say where.

        Raises:
            UserError: the host has no such address, or the keys cannot be read.
        """
        socket = self._make(zmq.ROUTER)
        socket.router_mandatory = True
        if self._keys is not None:
            keys = load_keys(self._keys, "server")
            self._authenticator = Authenticator(self._context, [keys.other])
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        if over_tcp:
            socket.handshake_ivl = _HANDSHAKE_MS
            socket.maxmsgsize = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            self._endpoints = [_bind_tcp(socket, host)]
            self._links = self.sockets = [RouterLink(socket, num_workers)]
        else:
            self._endpoints = [f"ipc://{make_socket_folder() / 'server'}"]
            socket.bind(self._endpoints[0])
            self.sockets = [socket]
        self._store.set(f"pid {self._process_rank}", str(os.getpid()))
        self._store.set(f"host {self._process_rank}", json.dumps([host_identity(), sockets.gethostname()]))
        self._store.set(f"endpoint {self._process_rank}", self._endpoints[0])

    def find(self) -> None:
        """Worker: where all servers listen; blocks until they do."""
        self._endpoints = [self._store.get(f"endpoint {server}").decode() for server in range(self._num_servers)]

    def connect(self, own: bytes) -> None:
        """A worker: to all servers that were found, which know it by this identity."""
        for server, endpoint in enumerate(self._endpoints):
            if endpoint.startswith("tcp:"):
                link = DealerLink(self._make_dealer, endpoint, own, self._elsewhere(server))
                self._links.append(link)
                self.sockets.append(link)
            else:
                dealer = self._make(zmq.DEALER)
                dealer.routing_id = own
                dealer.connect(endpoint)
                self.sockets.append(dealer)

    def _elsewhere(self, server: int) -> str | None:
        """What to call a server on another host; None for one on this host."""
        identity, name = json.loads(self._store.get(f"host {server}"))
        return None if identity == host_identity() else f"server {server} on {name}"

    def _make_dealer(self) -> zmq.Socket[bytes]:
        dealer = self._make(zmq.DEALER)
        if self._keys is not None:
            keys = load_keys(self._keys, "worker")
            dealer.curve_serverkey = keys.other
            dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        return dealer

    def _make(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # what is under way is bounded by one step; dropping would lose gradients
        # Not ZeroMQ's own heartbeats: on a slow link they wait behind a large message, and would end a good connection.
        socket.tcp_maxrt = _SILENT_MS
        socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl = 1, 1, 1
        socket.connect_timeout = _CONNECT_MS
        return socket

    def meet_peers(
        self, transport: str, num_workers: int, backend: str, start_timeout: timedelta, step_timeout: timedelta
    ) -> None:
        """For ``transport`` naive and collective; blocks until server and workers are here."""
        store, rank, size = dist.PrefixStore("peers", self._store), self._process_rank, num_workers + 1
        if transport == "naive":
            self.peers = NaivePeers(store, rank, size, start_timeout)
        elif transport == "collective":
            self.peers = CollectivePeers(store, rank, size, backend, start_timeout, step_timeout)

    # -- servers that die ------------------------------------------------------------------------------------

    def watch(self, servers: Sequence[int], speaks_for: Sequence[int]) -> None:
        """See :class:`.ServerWatch`. Of servers on other hosts the socket tells, see :class:`.DealerLink`."""
        here = [server for server in servers if self._elsewhere(server) is None]
        if is_supervised() or not here:
            return
        pids = {server: int(self._store.get(f"pid {server}")) for server in here}
        self._watch = ServerWatch(pids, speaks_for, self._endpoints)

    def stop_watching(self) -> None:
        """From now on servers may end."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None

    # -- the end ---------------------------------------------------------------------------------------------

    def await_farewells(self) -> None:
        """Server: all workers have left; see :meth:`.RouterLink.await_farewells`."""
        for link in self._links:
            if isinstance(link, RouterLink):
                link.await_farewells()

    def close(self, linger_ms: int) -> None:
        """Let go of all, giving what was sent at most ``linger_ms`` to leave."""
        self.stop_watching()
        for link in self._links:
            if isinstance(link, DealerLink):
                link.drain(linger_ms)
            link.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(linger_ms)
        for endpoint in self._endpoints:
            remove_socket_folder(endpoint)


def _bind_tcp(socket: zmq.Socket[bytes], host: str) -> str:
    """The endpoint."""
    try:
        return f"tcp://{host}:{socket.bind_to_random_port(f'tcp://{host}')}"
    except zmq.ZMQError as error:
        socket.close(0)
        raise UserError(f"--trainer.strategy.host {host}: the server cannot listen there ({error})") from error
