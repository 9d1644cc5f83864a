"""A run whose connections are cut at random, in the middle of messages, ends as one whose connections are not."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zmq
from distributed import run_distributed
from training import train

from gradsync.comm.server.conversation import make_token
from gradsync.comm.server.ledger import identity
from gradsync.strategies import server_connection
from gradsync.strategies.server_connection import ServerConnection

TCP: dict[str, Any] = {"transport": "tcp", "part_mib": 0.001}


class CuttingProxy:
    """Forwards TCP connections to ``target``, and cuts each after a random number of bytes, so in mid-frame."""

    def __init__(self, target: tuple[str, int], seed: int, most_bytes: int, num_cuts: int) -> None:
        self._target = target
        self._rng = random.Random(seed)
        self._most_bytes = most_bytes
        self._cuts_left = num_cuts
        self.num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            budget = [self._rng.randrange(300, self._most_bytes)]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink, budget), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, budget: list[int]) -> None:
        try:
            while data := source.recv(4096):
                if self._cuts_left > 0 and len(data) > budget[0]:
                    sink.sendall(data[: max(0, budget[0])])
                    self._cuts_left -= 1
                    self.num_cuts += 1
                    break
                budget[0] -= len(data)
                sink.sendall(data)
        except OSError:
            pass  # the other direction was cut
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _fit(rank: int, options: dict[str, Any], seed: int, num_cuts: int) -> dict[str, Any]:
    """As :func:`training.train`, with a proxy before the server."""
    proxies: list[CuttingProxy] = []
    bind = server_connection._bind_tcp

    def bind_behind_proxy(zmq_socket: Any, host: str) -> str:
        port = int(bind(zmq_socket, host).rpartition(":")[2])
        proxies.append(CuttingProxy((host, port), seed, 20_000, num_cuts))
        return f"tcp://{host}:{proxies[0].port}"

    server_connection._bind_tcp = bind_behind_proxy
    state = train(rank, "parameter_server", 3, {"optimizer": "adamw"}, {}, options)
    return {**state, "cuts": sum(proxy.num_cuts for proxy in proxies)}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_connections_are_cut_is_equal_to_the_bit(seed: int) -> None:
    states = run_distributed(_fit, 3, TCP, seed, 25)
    expected = run_distributed(train, 3, "parameter_server", 3, {"optimizer": "adamw"})
    assert states[0].pop("cuts") > 10
    assert states[0].keys() == expected[0].keys()
    assert all(torch.equal(states[0][name], expected[0][name]) for name in states[0])


def test_whatever_strangers_send_a_worker_is_heard_once_and_in_order() -> None:
    """Strangers who know everything about the protocol but a worker's token."""
    rng, store = random.Random(0), dist.HashStore()
    server, worker = ServerConnection(store, 0, 1), ServerConnection(store, 1, 1)
    context = zmq.Context()
    heard: list[bytes] = []
    try:
        server.bind(True, "127.0.0.1", 2)
        worker.find()
        worker.connect(identity(0))
        stranger = context.socket(zmq.DEALER)
        stranger.linger, stranger.routing_id = 0, b"0:stranger"
        for number in range(300):
            worker.sockets[0].send_multipart([str(number).encode()])
            assert server.sockets[0].poll(30_000)
            heard.append(server.sockets[0].recv_multipart()[1].bytes)
            if number == 0:
                stranger.connect(store.get("endpoint 0").decode())
            numbers = rng.choice([0, 1, number + 2, 2**64 - 1]), rng.choice([0, 2**63])
            header = struct.pack("<16sQQ", make_token(), *numbers)
            hostile = [header[: rng.choice([0, 31, 32, 32, 32])], *(rng.randbytes(9) for _ in range(rng.randrange(4)))]
            stranger.send_multipart(hostile, zmq.DONTWAIT)
        assert not server.sockets[0].poll(200)
        server.sockets[0].send_multipart([b"0", b"answer"])
        assert worker.sockets[0].poll(30_000)
        assert worker.sockets[0].recv_multipart()[0].bytes == b"answer"
    finally:
        context.destroy(0)
        worker.close(0)
        server.close(0)
    assert heard == [str(number).encode() for number in range(300)]
