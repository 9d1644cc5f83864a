"""A conversation of real workers with a real server, recorded, and what can go wrong with one of its messages."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
import zmq

from gradsync.comm import Timeline
from gradsync.comm.server import AsyncServer, ParameterServer, RemoteOptimizer, SyncServer, WorkerClient

NUM_WORKERS = 2
PART_MIB = 0.001
KINDS: dict[str, torch.dtype | None] = {"sync": None, "sync in bfloat16": torch.bfloat16, "async": None}
"""Servers, and in which dtype gradients and parameters travel."""
_TIMEOUT_S = 60.0
_NUM_STEPS = 2
Frames = list[bytes]
Talk = list[Frames]


def make_server(kind: str, socket: Any) -> tuple[ParameterServer, list[torch.Tensor]]:
    """A server, and the parameters that it serves."""
    named = _named()
    parameters = [p for _, p in named]
    common = (socket, [_sgd(named)], [named], NUM_WORKERS, _TIMEOUT_S, PART_MIB, lambda: None, lambda _: None, False)
    return (AsyncServer if kind == "async" else SyncServer)(*common, KINDS[kind]), parameters


def record(kind: str) -> Talk:
    """What two workers send in a short run: all kinds of messages but *grow*, each with the sender's name in front."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind("inproc://server")
    tap = _Tap(router)
    server, _ = make_server(kind, tap)
    workers = [threading.Thread(target=_work, args=(context, rank, kind)) for rank in range(NUM_WORKERS)]
    for worker in workers:
        worker.start()
    try:
        server.serve()
        for worker in workers:
            worker.join()
    finally:
        router.close(0)
        context.destroy(0)
    return tap.talk


class _Tap:
    """A ROUTER socket that keeps what comes in."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.talk: Talk = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self, copy: bool = True) -> list[Any]:
        frames: list[Any] = self._socket.recv_multipart(copy=copy)
        self.talk.append([frame.bytes for frame in frames])
        return frames


def _named() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (n, torch.nn.Parameter(torch.randn(s, generator=generator))) for n, s in {"w": (40, 15), "b": (40,)}.items()
    ]


def _sgd(named: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=0.5, momentum=0.5)


def _work(context: zmq.Context[Any], rank: int, kind: str) -> None:
    dealer = context.socket(zmq.DEALER)
    dealer.routing_id = str(rank).encode()
    dealer.connect("inproc://server")
    named = _named()
    in_lockstep = kind != "async"
    client = WorkerClient(
        *(dealer, [named], rank, _TIMEOUT_S, PART_MIB, Timeline()), in_lockstep=in_lockstep, wire_dtype=KINDS[kind]
    )
    client.start()
    optimizer = RemoteOptimizer(_sgd(named), client, 0)
    for _ in range(_NUM_STEPS):
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, 1.0 + rank)
        optimizer.step()
    client.fetch()
    if rank == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    client.bye({"words": rank}, {"buffer": torch.ones(3)})
    dealer.close(int(_TIMEOUT_S * 1000))


# -- what goes wrong with a message: None if it is not of a kind that can -------------------------------------------


def _cut(talk: Talk, at: int, rng: random.Random) -> Frames | None:
    frames = list(talk[at])
    which = rng.choice([index for index, frame in enumerate(frames) if frame and index > 0])
    frames[which] = frames[which][: rng.randrange(len(frames[which]))]
    return frames if rng.random() < 0.8 else talk[at][: rng.randrange(1, len(frames))]


def _long(talk: Talk, at: int, rng: random.Random) -> Frames:
    frames = list(talk[at])
    which = rng.randrange(1, len(frames))
    frames[which] += rng.randbytes(rng.choice([1, 2, 4, 64, 4096]))
    return frames if rng.random() < 0.8 else [*talk[at], rng.randbytes(rng.randrange(9))]


def _flipped(talk: Talk, at: int, rng: random.Random) -> Frames:
    """Bits of the sender's name, the header, or the JSON. Those of a gradient are for encryption to protect."""
    frames = list(talk[at])
    which = rng.choice([index for index, frame in enumerate(frames[:3]) if frame])
    changed = bytearray(frames[which])
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    frames[which] = bytes(changed)
    return frames


def _doubled(talk: Talk, at: int, rng: random.Random) -> Frames | None:
    """The message before, again: a push that comes twice."""
    return list(talk[at - 1]) if at else None


def _replayed(talk: Talk, at: int, rng: random.Random) -> Frames | None:
    return list(talk[rng.randrange(at)]) if at else None


def _early(talk: Talk, at: int, rng: random.Random) -> Frames:
    return list(talk[rng.randrange(at, len(talk))])


def _other_dtype(talk: Talk, at: int, rng: random.Random) -> Frames | None:
    """A payload in another dtype, or one named in the text."""
    frames, text = list(talk[at]), talk[at][2]
    if b"torch.float32" in text or b"torch.bfloat16" in text:
        dtype = rng.choice([b"torch.float64", b"torch.int8", b"torch.bool", b"torch.complex64", b"os.system"])
        frames[2] = text.replace(b"torch.float32", dtype).replace(b"torch.bfloat16", dtype)
        return frames
    if not frames[3]:
        return None
    dtype = rng.choice([torch.float64, torch.int16, torch.int8])
    values = torch.frombuffer(bytearray(frames[3]), dtype=torch.int16 if len(frames[3]) % 4 else torch.float32)
    frames[3] = values.to(dtype).view(torch.uint8).numpy().tobytes()
    return frames if len(frames[3]) != len(talk[at][3]) else None


_JUNK: list[Any] = [None, True, -1, 2**70, 1e308, "", "norm", [], [[]], {}, {"items": 3}, [[True, 1]], {"dtype": 0}]


def _junk(talk: Talk, at: int, rng: random.Random) -> Frames:
    """JSON that says something else, or nothing, or is none."""
    frames = list(talk[at])
    info = json.loads(frames[2]) if frames[2] else None
    if isinstance(info, dict) and info and rng.random() < 0.8:
        info[rng.choice(list(info))] = rng.choice(_JUNK)
        frames[2] = json.dumps(info).encode()
    else:
        frames[2] = rng.choice([b"{", b"\xff\xfe", b"[" * 5000, b"NaN", *(json.dumps(j).encode() for j in _JUNK)])
    return frames


def _random(talk: Talk, at: int, rng: random.Random) -> Frames:
    return [talk[at][0], *(rng.randbytes(rng.choice([0, 1, 8, 8, 40])) for _ in range(rng.choice([1, 3, 3, 3, 7])))]


Mutation = Callable[[Talk, int, random.Random], Frames | None]
MUTATIONS: dict[str, Mutation] = {
    "cut": _cut,
    "long": _long,
    "flipped": _flipped,
    "doubled": _doubled,
    "replayed": _replayed,
    "early": _early,
    "wrong dtype": _other_dtype,
    "junk": _junk,
    "random": _random,
}


def mutate(name: str, talk: Talk, at: int, rng: random.Random) -> Frames:
    """A hostile message instead of ``talk[at]``."""
    frames = MUTATIONS[name](talk, at, rng)
    return _cut(talk, at, rng) or [] if frames is None else frames
