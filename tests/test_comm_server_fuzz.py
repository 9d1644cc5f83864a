"""Confused and hostile workers: whatever they send, a server goes on or ends with an error that says who and what."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zmq

from gradsync.comm.packing import pack_tree, tensor_bytes
from gradsync.comm.server import AsyncServer, ParameterServer, ProtocolError, SyncServer, WorkerFailed
from gradsync.comm.server.layout import Layout
from gradsync.comm.server.protocol import Kind, Message, table_of

PART_MIB = 0.001
NUM_WORKERS = 2
WIRE_DTYPES = {"sync": None, "sync in bfloat16": torch.bfloat16, "async": None}
"""Kinds of servers, and in which dtype gradients and parameters travel."""
NUM_CASES = 400
JUNK: list[Any] = [None, True, -1, 0, 2**70, 1e308, "", "norm", [], [[]], {}, {"items": 3}, [[True, 1]], {"dtype": 0}]
Frames = list[Any]


class _Wire:
    def __init__(self) -> None:
        self.incoming: list[Frames] = []

    def recv_multipart(self, copy: bool) -> Frames:
        return [zmq.Frame(bytes(frame)) for frame in self.incoming.pop(0)]

    def send_multipart(self, frames: Frames, copy: bool) -> None:
        pass


def _zeros() -> list[tuple[str, torch.Tensor]]:
    return [(n, torch.nn.Parameter(torch.zeros(s))) for n, s in {"w": (40, 30), "b": (40,)}.items()]


def _make(kind: str, wire: Any) -> tuple[ParameterServer, list[tuple[str, torch.Tensor]]]:
    named = _zeros()
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    every = [*named, _joins()]
    common = (wire, [optimizer], [named], NUM_WORKERS, 60.0, PART_MIB, lambda: None, lambda _: None, False)
    made = (AsyncServer if kind == "async" else SyncServer)(*common, WIRE_DTYPES[kind], dict(every))
    return made, every


def _joins() -> tuple[str, torch.Tensor]:
    return "late", torch.nn.Parameter(torch.zeros(20))


def _conversation(wire_dtype: torch.dtype | None, num_steps: int = 2) -> list[tuple[int, Message]]:
    """What two well-behaved workers send. Gradients are -1, so a step adds 1 to every parameter."""
    named = _zeros()
    layout = Layout([p for _, p in named], PART_MIB)
    parts = list(layout.all_parts())
    hello = Message(Kind.HELLO, info={"tables": [table_of(named, wire_dtype)], "memory": None})
    talk = [(worker, hello) for worker in range(NUM_WORKERS)]
    talk += [(0, Message(Kind.INIT, 0, b.index(), n, payload=_bytes(0.0, e - s))) for b, n, s, e in parts]
    row = [*table_of([_joins()])[0][:5], 0, 20]
    grow = {"unfrozen": [], "groups": [{"settings": {"lr": 1.0}, "rows": [row]}], "memory": None}
    talk += [(worker, Message(Kind.GROW, 0, info=grow, payload=_bytes(0.0, 20))) for worker in range(NUM_WORKERS)]
    layout.extend([_joins()[1]])
    parts = list(layout.all_parts())
    used = [[True] * len(bucket.parameters()) for bucket in layout.buckets]
    for step in range(num_steps):
        groups = [{"lr": 1.0}, {"lr": 1.0}]
        info = {"used": used, "groups": groups, "clip": {"algorithm": None, "value": 0.0}, "sequence": step + 1}
        for worker in range(NUM_WORKERS):
            talk.append((worker, Message(Kind.STEP, 0, info=info)))
            for b, part, start, end in parts:
                gradient = _bytes(-1.0, end - start, wire_dtype)
                talk.append((worker, Message(Kind.PUSH, 0, b.index(), part, payload=gradient)))
    optimizer = torch.optim.SGD([{"params": [p for _, p in named]}, {"params": [_joins()[1]]}], lr=1.0)
    state, payload = pack_tree(optimizer.state_dict())
    talk += [(0, Message(Kind.SET_STATE, 0, info=state, payload=payload)), (0, Message(Kind.GET_STATE, 0))]
    talk += [(1, Message(Kind.FETCH, 0)), (0, Message(Kind.FETCH, 0))]
    tree, payload = pack_tree({"buffer": torch.ones(3)})
    talk += [(w, Message(Kind.BYE, info={"info": None, "tree": tree}, payload=payload)) for w in range(NUM_WORKERS)]
    return talk


def _bytes(value: float, numel: int, dtype: torch.dtype | None = None) -> bytes:
    return bytes(tensor_bytes(torch.full((numel,), value, dtype=dtype or torch.float32)))


def _frames(kind: str) -> list[Frames]:
    talk = _conversation(WIRE_DTYPES[kind])
    return [[str(worker).encode(), *map(bytes, message.frames())] for worker, message in talk]


# -- what goes wrong: each changes the conversation at a random place ---------------------------------------------


def _header(talk: list[Frames], at: int, rng: random.Random) -> None:
    header = bytearray(talk[at][1])
    header[rng.randrange(len(header))] = rng.choice([0, 1, 2, 5, 8, 13, 200, 255])
    talk[at][1] = bytes(header)


def _field(talk: list[Frames], at: int, rng: random.Random) -> None:
    """A field, of this message or within one of its fields, is junk or gone."""
    at = rng.choice([index for index, frames in enumerate(talk) if frames[2]])
    info = json.loads(talk[at][2])
    inner = info
    for _ in range(rng.randrange(5)):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or not isinstance(inner[key := rng.choice(keys)], (dict, list)) or not inner[key]:
            break
        inner = inner[key]
    key = rng.choice(list(inner) if isinstance(inner, dict) else list(range(len(inner))))
    if rng.random() < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice(JUNK)
    talk[at][2] = json.dumps(info).encode()


def _text(talk: list[Frames], at: int, rng: random.Random) -> None:
    texts = [b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", *(json.dumps(junk).encode() for junk in JUNK)]
    talk[at][2] = rng.choice(texts)


def _payload(talk: list[Frames], at: int, rng: random.Random) -> None:
    talk[at][3] = rng.choice([b"", talk[at][3][:-1], talk[at][3] + b"\0\0\0\0", talk[at][3] * 2])


def _sender(talk: list[Frames], at: int, rng: random.Random) -> None:
    talk[at][0] = rng.choice([b"0", b"1", b"2", b"-1", b"x", b"", b"00", "١".encode()])


def _number_of_frames(talk: list[Frames], at: int, rng: random.Random) -> None:
    talk[at] = rng.choice([talk[at][:2], [*talk[at], b""]])


def _repeat(talk: list[Frames], at: int, rng: random.Random) -> None:
    talk.insert(rng.randrange(at, len(talk)), list(talk[at]))


def _swap(talk: list[Frames], at: int, rng: random.Random) -> None:
    other = rng.randrange(len(talk))
    talk[at], talk[other] = talk[other], talk[at]


def _drop(talk: list[Frames], at: int, rng: random.Random) -> None:
    del talk[at]


MUTATIONS: list[Callable[[list[Frames], int, random.Random], None]] = [
    *(_header, _field, _text, _payload, _sender, _number_of_frames, _repeat, _swap, _drop)
]


def _run(kind: str, talk: list[Frames]) -> tuple[Exception | None, torch.Tensor]:
    """How the server ends, None for in peace; the parameters then."""
    wire = _Wire()
    wire.incoming = talk
    server, named = _make(kind, wire)
    failure = None
    try:
        while wire.incoming:
            server._receive()
    except (ProtocolError, WorkerFailed) as error:
        failure = error
    return failure, torch.cat([p.detach().reshape(-1) for _, p in named])


@pytest.mark.parametrize(("kind", "num_steps"), [("sync", 2), ("sync in bfloat16", 2), ("async", 4)])
def test_a_conversation_without_faults_is_served(kind: str, num_steps: int) -> None:
    failure, values = _run(kind, _frames(kind))
    assert failure is None
    assert values.unique().tolist() == [num_steps]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("kind", WIRE_DTYPES)
def test_whatever_a_worker_sends_the_error_is_named_and_no_step_is_done_by_halves(kind: str, mutate: Any) -> None:
    refused = 0
    for seed in range(NUM_CASES // 10):
        rng = random.Random(f"{mutate.__name__} {seed}")
        talk = _frames(kind)
        mutate(talk, rng.randrange(len(talk)), rng)
        failure, values = _run(kind, talk)
        assert failure is None or str(failure), seed
        refused += failure is not None
        if kind == "async":  # sync steps bucket by bucket as they become complete
            for group in values.split([1240, 20]):  # a malformed learning rate may be a valid one, of its group
                assert group.unique().numel() == 1, seed
        assert all(value == int(value) and 0 <= value <= 8 for value in values.unique().tolist()), seed
    assert mutate is _drop or refused > 0, "or the mutation does nothing"


def test_values_to_start_from_are_refused_once_training_has_begun() -> None:
    talk = _frames("async")
    talk.insert(-4, next(frames for frames in talk if frames[1][0] == Kind.INIT))
    failure, values = _run("async", talk)
    assert "INIT after the workers were welcomed" in str(failure)
    assert values.unique().tolist() == [4]


# -- phase: grow ---------------------------------------------------------------------------------------------------


def _with_other_growth(change: Callable[[dict[str, Any]], None], which: int = 0) -> list[Frames]:
    talk = _frames("async")
    at = [index for index, frames in enumerate(talk) if frames[1][0] == Kind.GROW][which]
    request = json.loads(talk[at][2])
    change(request)
    talk[at][2] = json.dumps(request).encode()
    return talk


def _set_row(index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda request: request["groups"][0]["rows"][0].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set_row(0, "unknown"), "'unknown' join, which the server's optimizer cannot take in"),
        (_set_row(0, "w"), "'w' join, which the server's optimizer cannot take in"),
        (_set_row(1, [21]), "the server has"),
        (_set_row(6, 21), "elements 0 to 21 of 'late'"),
        (_set_row(5, -1), "elements -1 to 20 of 'late'"),
        (_set_row(6, 10), "sends 80 bytes for what joins, expected 40"),
        (_set_row(4, False), "expected 0"),
        (_set_row(5, 10.5), "malformed 'groups'"),
        (lambda r: r["groups"][0]["rows"].append(r["groups"][0]["rows"][0]), "lets a parameter join twice"),
        (lambda r: r["groups"][0]["settings"].update(lr="fast"), "'lr' of another type"),
        (lambda r: r["unfrozen"].append(r["groups"].pop()["rows"][0]), "'late' join, which"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_cannot_join_is_refused_and_changes_nothing(kind: str, change: Any, text: str) -> None:
    failure, values = _run(kind, _with_other_growth(change))
    assert isinstance(failure, ProtocolError)
    assert text in str(failure)
    assert values.unique().tolist() == [0]


def test_workers_must_ask_for_the_same() -> None:
    failure, _ = _run("async", _with_other_growth(lambda r: r["groups"][0]["settings"].update(lr=0.5), which=1))
    assert "worker 1 unfreezes other parameters, or with other settings, than another worker did (late)" in str(failure)


def test_in_async_mode_a_worker_may_go_on_with_what_it_knows() -> None:
    """Worker 1 asks after two steps of its own, and the end is as if it had asked at once."""
    talk = _frames("async")
    at = [index for index, frames in enumerate(talk) if frames[1][0] == Kind.GROW][1]
    late = talk.pop(at)
    steps = [index for index, frames in enumerate(talk) if frames[0] == b"1" and frames[1][0] == Kind.STEP]
    for index in steps:
        info = json.loads(talk[index][2])
        talk[index][2] = json.dumps({**info, "used": info["used"][:-1], "groups": info["groups"][:1]}).encode()
    last = len(json.loads(talk[steps[0]][2])["used"])
    talk = [f for f in talk if not (f[0] == b"1" and f[1][0] == Kind.PUSH and f[1][2] == last)]
    talk.insert(len(talk) - 2, late)
    failure, values = _run("async", talk)
    assert failure is None
    assert values.split([1240, 20])[0].unique().tolist() == [4]
    assert values[1240:].unique().tolist() == [2]


def test_in_sync_mode_nobody_steps_without_what_others_have_unfrozen() -> None:
    talk = _frames("async")
    del talk[[index for index, frames in enumerate(talk) if frames[1][0] == Kind.GROW][1]]
    failure, values = _run("sync", talk)
    assert "worker 1 steps without 'late', which another worker has unfrozen" in str(failure)
    assert values.unique().tolist() == [0]
