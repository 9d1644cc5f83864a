"""Async and bounded mode without processes: seeded schedules of arrival on a virtual clock, and a whole server."""

from __future__ import annotations

import heapq
import random
import threading
from collections import deque
from typing import Any

import pytest
import torch
import zmq

from gradsync.comm import Timeline
from gradsync.comm.packing import tensor_bytes, tensor_from
from gradsync.comm.server import AsyncServer, ProtocolError, RemoteOptimizer, WorkerClient
from gradsync.comm.server.layout import Layout
from gradsync.comm.server.protocol import Kind, Message, table_of

NO_CLIP = {"algorithm": None, "value": 0.0}
PART_MIB = 0.001
Named = list[tuple[str, torch.Tensor]]


def _named() -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (40, 30), "bias": (40,), "scale": (1,)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def _sgd(named: Named, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=lr, momentum=0.9)


# -- simulated schedules -----------------------------------------------------------------------------------------


class _Wire:
    """A socket of the server as a simulation sees it: messages go in one by one, answers pile up per worker."""

    def __init__(self) -> None:
        self.incoming: deque[list[Any]] = deque()
        self.sent: dict[int, list[Message]] = {}

    def recv_multipart(self, copy: bool) -> list[Any]:
        return [zmq.Frame(frame) for frame in self.incoming.popleft()]

    def send_multipart(self, frames: list[Any], copy: bool) -> None:
        message = Message.parse([memoryview(bytearray(frame)) for frame in frames[1:]])
        self.sent.setdefault(int(frames[0]), []).append(message)


class _Simulation:
    """Workers that compute and send for random times. Every event is one message that reaches the server.

    Each worker's gradient is -1 everywhere, so with SGD without momentum at learning rate 1 every parameter of the
    server is its start plus the number of steps: a reply that mixes two states shows.
    """

    def __init__(self, seed: int, num_workers: int, num_steps: int, **options: Any) -> None:
        self.random = random.Random(seed)
        self.wire = _Wire()
        self.applied: list[int] = []
        named = [(name, torch.nn.Parameter(torch.zeros_like(p))) for name, p in _named()]
        self.server = AsyncServer(
            *(self.wire, [torch.optim.SGD([p for _, p in named], lr=1.0)], [named], num_workers, 60.0, PART_MIB),
            *(lambda: None, lambda _: None),
            on_apply=self.applied.append,
            **options,
        )
        self.layout = Layout([p for _, p in named], PART_MIB)
        self.num_steps = num_steps
        self.speed = [self.random.choice([1.0, 1.0, 10.0]) for _ in range(num_workers)]
        self.events: list[tuple[float, float, int, list[Any]]] = []
        self.now = 0.0
        self.begun = dict.fromkeys(range(num_workers), 0)
        self.seen: dict[int, list[float]] = {worker: [] for worker in range(num_workers)}
        self.max_ahead = 0
        init = [
            Message(Kind.INIT, 0, b.index(), part, payload=tensor_bytes(torch.zeros(end - start)))
            for b, part, start, end in self.layout.all_parts()
        ]
        for worker in range(num_workers):
            hello = Message(Kind.HELLO, info={"tables": [table_of(named)], "memory": None})
            self._send(worker, 0.0, [hello, *(init if worker == 0 else [])])

    def _send(self, worker: int, delay: float, messages: list[Message]) -> None:
        """Messages of one worker arrive in order, with gaps in which others' may come."""
        time = self.now + delay
        for message in messages:
            time += self.random.random() * 0.1
            heapq.heappush(
                self.events, (time, len(self.events) + self.random.getrandbits(30), worker, message.frames())
            )

    def run(self) -> None:
        while self.events:
            self.now, _, worker, frames = heapq.heappop(self.events)
            self.wire.incoming.append([str(worker).encode(), *frames])
            self.server._receive()
            for other in list(self.wire.sent):
                self._answer(other, self.wire.sent[other])

    def _answer(self, worker: int, messages: list[Message]) -> None:
        if messages[-1].kind == Kind.WELCOME:
            self._begin_step(worker)
        elif messages[-1].kind == Kind.DONE:
            values = torch.cat([tensor_from(m.payload, torch.float32) for m in messages if m.kind == Kind.PULL])
            assert values.unique().numel() == 1, "a reply between two steps"
            self.seen[worker].append(values[0].item())
            self._begin_step(worker)
        else:
            return
        del self.wire.sent[worker]

    def _begin_step(self, worker: int) -> None:
        if self.begun[worker] == self.num_steps:
            self._send(worker, 0.0, [Message(Kind.BYE, info={"info": None, "tree": {"value": None}})])
            return
        behind = min(self.applied.count(other) for other in self.begun)
        self.max_ahead = max(self.max_ahead, self.applied.count(worker) - behind)
        self.begun[worker] += 1
        used = [[True] * len(b.parameters()) for b in self.layout.buckets]
        info = {"used": used, "groups": [{"lr": 1.0}], "clip": NO_CLIP, "sequence": self.begun[worker]}
        ones = [
            Message(Kind.PUSH, 0, b.index(), part, payload=tensor_bytes(-torch.ones(end - start)))
            for b, part, start, end in self.layout.all_parts()
        ]
        delay = self.speed[worker] * self.random.expovariate(1.0)
        self._send(worker, delay, [Message(Kind.STEP, 0, info=info), *ones])


@pytest.mark.parametrize("staleness", [None, 1, 4])
def test_every_schedule_applies_each_push_once_and_keeps_the_bound(staleness: int | None) -> None:
    """1,000 schedules in all, of 2 to 4 workers, some of them ten times slower than the others."""
    was_ahead = 0
    for seed in range(334):
        num_workers, num_steps = 2 + seed % 3, 6
        simulation = _Simulation(seed, num_workers, num_steps, staleness=staleness)
        simulation.run()
        assert sorted(simulation.applied) == sorted(list(range(num_workers)) * num_steps)
        for versions in simulation.seen.values():
            assert len(versions) == num_steps
            assert versions == sorted(set(versions)), "a worker was given older parameters than before"
        assert max(v[-1] for v in simulation.seen.values()) == num_workers * num_steps
        if staleness is not None:
            assert simulation.max_ahead <= staleness
        was_ahead = max(was_ahead, simulation.max_ahead)
    assert was_ahead == (5 if staleness is None else min(staleness, 5))  # the bound is reached, so it is what binds


@pytest.mark.parametrize("staleness", [None, 2])
def test_a_recorded_schedule_replays_whatever_the_order_of_arrival(staleness: int | None) -> None:
    recorded = _Simulation(1, 3, 5, staleness=staleness)
    recorded.run()
    replayed = _Simulation(2, 3, 5, staleness=staleness, schedule=recorded.applied)
    replayed.run()
    other = _Simulation(2, 3, 5, staleness=staleness)
    other.run()
    assert replayed.applied == recorded.applied != other.applied


# -- a whole server in this process ------------------------------------------------------------------------------


class _World:
    def __init__(self, num_workers: int, shared: bool, **options: Any) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.num_workers, self.shared = num_workers, shared
        self.named = _named()
        self.sockets = [self.context.socket(zmq.ROUTER)]
        self.sockets[0].bind("inproc://server")
        self.server = AsyncServer(
            *(self.sockets[0], [_sgd(self.named)], [self.named], num_workers, 60.0, PART_MIB),
            *(lambda: None, lambda _: None),
            shared=shared,
            **options,
        )
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.server.serve()
        except Exception as error:
            self.error = error

    def client(self, rank: int, named: Named) -> WorkerClient:
        socket = self.context.socket(zmq.DEALER)
        socket.routing_id = str(rank).encode()
        socket.connect("inproc://server")
        self.sockets.append(socket)
        sharing = self.num_workers if self.shared else None
        common = (socket, [named], rank, 60.0, PART_MIB, Timeline())
        return WorkerClient(*common, sharing_workers=sharing, in_lockstep=False)

    def close(self) -> None:
        self.thread.join(65)
        assert not self.thread.is_alive()
        for socket in self.sockets:
            socket.close(0)
        self.context.term()


@pytest.fixture(params=[False, True], ids=["socket", "shared"])
def shared(request: pytest.FixtureRequest) -> bool:
    return request.param


def _set_gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_one_worker_equals_plain_training_to_the_bit(shared: bool) -> None:
    world = _World(1, shared)
    named, plain = _named(), _named()
    client, reference = world.client(0, named), _sgd(plain)
    client.start()
    optimizer = RemoteOptimizer(_sgd(named), client, 0)
    for step in range(6):
        for model, opt in ((named, optimizer), (plain, reference)):
            _set_gradients(model, step)
            if step == 3:
                model[1][1].grad = None  # unused: momentum must not move it
            opt.param_groups[0]["lr"] = 0.1 / (1 + step)
            opt.step()
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, plain, strict=True))
    client.bye()
    world.close()


def _train(world: _World, client: WorkerClient, named: Named, rank: int, num_steps: int) -> None:
    client.start()
    optimizer = RemoteOptimizer(_sgd(named), client, 0)
    for step in range(num_steps):
        _set_gradients(named, 1000 * rank + step)
        optimizer.step()
    client.fetch()
    client.bye()


def _train_together(shared: bool, **options: Any) -> list[torch.Tensor]:
    world = _World(3, shared, **options)
    models = [_named() for _ in range(3)]
    clients = [world.client(rank, named) for rank, named in enumerate(models)]
    threads = [
        threading.Thread(target=_train, args=(world, client, named, rank, 10))
        for rank, (client, named) in enumerate(zip(clients, models, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.close()
    assert world.error is None
    return [p.detach().clone() for _, p in world.named]


def test_a_recorded_run_replays_to_the_bit(shared: bool) -> None:
    """The gradients of a step are fixed here, so the order of steps is all that may differ."""
    order: list[int] = []
    first = _train_together(shared, on_apply=order.append)
    again = _train_together(shared, schedule=order)
    assert sorted(order) == sorted([0, 1, 2] * 10)
    assert all(map(torch.equal, first, again))


def test_the_correction_divides_the_learning_rate_by_the_steps_that_came_between() -> None:
    world = _World(2, False, corrects_staleness=True, schedule=[0, 0, 1])
    models = [_named(), _named()]
    clients = [world.client(rank, named) for rank, named in enumerate(models)]
    starts = [threading.Thread(target=client.start) for client in clients]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    optimizers = [RemoteOptimizer(_sgd(named), client, 0) for named, client in zip(models, clients, strict=True)]
    reference = _named()
    plain = _sgd(reference)
    for rank, seed, lr in ((0, 1, 0.1), (0, 2, 0.1), (1, 3, 0.1 / 3)):  # worker 1's gradient is two steps old
        _set_gradients(models[rank], seed)
        optimizers[rank].step()
        _set_gradients(reference, seed)
        plain.param_groups[0]["lr"] = lr
        plain.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(models[1], reference, strict=True))
    for client in clients:
        client.bye()
    world.close()


def test_a_step_that_comes_twice_is_refused() -> None:
    simulation = _Simulation(0, 2, 1)
    simulation.run()
    simulation.server._left.clear()  # as if nobody had said bye
    used = [[True] * len(b.parameters()) for b in simulation.layout.buckets]
    info = {"used": used, "groups": [{}], "clip": NO_CLIP, "sequence": 1}
    simulation.wire.incoming.append([b"0", *Message(Kind.STEP, 0, info=info).frames()])
    with pytest.raises(ProtocolError, match="worker 0 announced its step 1, but 1 were applied"):
        simulation.server._receive()
