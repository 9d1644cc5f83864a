"""A run whose connections are cut at random, in the middle of messages, ends as one whose connections are not."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from typing import Any

import pytest
import torch
from distributed import run_distributed
from training import train

from gradsync.strategies import server_connection

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
