"""The parameter server without processes: protocol, aggregation, and a whole server over ``inproc://``."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq

from gradsync.comm import Timeline
from gradsync.comm.optimizers import steps_per_tensor
from gradsync.comm.packing import MalformedTree, pack_tree, tensor_bytes, unpack_tree
from gradsync.comm.server import ProtocolError, RemoteOptimizer, ServerFailed, SyncServer, WorkerClient
from gradsync.comm.server.aggregator import Aggregator
from gradsync.comm.server.protocol import Kind, Message


def _named() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (40, 30), "bias": (40,), "scale": (1,)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def _sgd(named: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9)


# -- protocol ------------------------------------------------------------------------------------------------


def test_a_message_survives_the_wire() -> None:
    message = Message(Kind.PUSH, 1, 2, 3, {"lr": 0.1}, b"payload")
    parsed = Message.parse([bytes(frame) for frame in message.frames()])
    assert (parsed.kind, parsed.optimizer, parsed.bucket, parsed.part) == (Kind.PUSH, 1, 2, 3)
    assert (parsed.info, bytes(parsed.payload)) == ({"lr": 0.1}, b"payload")


def test_mutated_messages_are_refused_or_parsed_but_never_crash() -> None:
    generator = random.Random(1)
    good = [bytes(frame) for frame in Message(Kind.STEP, 0, 0, 0, {"a": [1, 2]}, b"xyz").frames()]
    refused = 0
    for _ in range(2000):
        frames = [bytearray(frame) for frame in good]
        victim = generator.choice(frames)
        for _ in range(generator.randrange(1, 4)):
            if victim:
                victim[generator.randrange(len(victim))] = generator.randrange(256)
        del frames[generator.randrange(3) :: generator.choice([1, 5])]
        try:
            Message.parse([bytes(frame) for frame in frames])
        except ProtocolError:
            refused += 1
    assert refused > 1000


def test_optimizer_state_survives_packing() -> None:
    named = _named()
    optimizer = torch.optim.AdamW([p for _, p in named], betas=(0.8, 0.9))
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {**optimizer.state_dict(), "half": torch.randn(3).bfloat16(), "empty": torch.empty(0, 2), "none": None}
    back = unpack_tree(*pack_tree(state))
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == state["state"].keys()
    for index, entry in state["state"].items():
        for key, value in entry.items():
            assert torch.equal(back["state"][index][key], value)
    assert torch.equal(back["half"], state["half"])
    assert back["empty"].shape == (0, 2)


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(TypeError, match="a set cannot travel"):
        pack_tree({"state": {1, 2}})


def test_a_state_that_does_not_fit_its_payload_is_refused() -> None:
    description, payload = pack_tree({"x": torch.ones(4)})
    with pytest.raises(MalformedTree, match="does not fit"):
        unpack_tree(description, payload[:-1])


# -- aggregation ---------------------------------------------------------------------------------------------

NO_CLIP = {"algorithm": None, "value": 0.0}


def _push_all(aggregator: Aggregator, gradients: list[list[torch.Tensor]], order: list[int]) -> None:
    """One step from ``gradients[worker]`` (in the layout's order), workers arriving in ``order``."""
    info = {"used": [[True] * len(b.parameters()) for b in aggregator.layout.buckets], "groups": [{}], "clip": NO_CLIP}
    flat = [torch.cat([g.reshape(-1) for g in worker]) for worker in gradients]
    for worker in order:
        aggregator.begin(worker, info)
    for worker in order:
        position = 0
        for bucket, part, start, end in aggregator.layout.all_parts():
            payload = tensor_bytes(flat[worker][position + start : position + end].clone())
            aggregator.add(worker, bucket.index(), part, payload)
            list(aggregator.advance(bucket.index()))
            if end == bucket.buffer().numel():
                position += end
    assert aggregator.finished
    aggregator.reset()


@pytest.mark.parametrize("part_mib", [0.0005, 1.0])
def test_the_order_of_arrival_does_not_change_a_bit(part_mib: float) -> None:
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        generator = torch.Generator().manual_seed(3)
        named = _named()
        parameters = [p for _, p in named]
        aggregator = Aggregator(_sgd(named), parameters, 3, part_mib)
        for _ in range(3):
            grads = [[torch.randn(p.shape, generator=generator) for p in reversed(parameters)] for _ in range(3)]
            _push_all(aggregator, grads, order)
        results.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_average_is_the_float64_average() -> None:
    named = _named()
    parameters = [p for _, p in named]
    before = [p.detach().clone() for p in parameters]
    aggregator = Aggregator(torch.optim.SGD(parameters, lr=1.0), parameters, 3, 1.0)
    grads = [[torch.randn(p.shape) for p in reversed(parameters)] for _ in range(3)]
    _push_all(aggregator, grads, [0, 1, 2])
    for index, parameter in enumerate(reversed(parameters)):
        exact = before[len(before) - 1 - index].double() - sum(worker[index].double() for worker in grads) / 3
        # three products, two sums and one subtraction of numbers below 10, each rounded to float32
        torch.testing.assert_close(parameter.double(), exact, rtol=0, atol=10 * 6 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda a: a.add(0, 99, 0, b""), "pushed bucket 99 out of turn"),
        (lambda a: a.add(0, 0, 0, b"123"), "3 bytes came for bucket 0 part 0"),
        (lambda a: a.add(0, 0, 77, b"123"), "part 77"),
        (lambda a: a.begin(0, {"used": [], "groups": [{}], "clip": NO_CLIP}), "other buckets"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_changes_nothing(act: Any, message: str) -> None:
    named = _named()
    aggregator = Aggregator(_sgd(named), [p for _, p in named], 1, 1.0)
    before = [p.detach().clone() for _, p in named]
    used = [[True] * len(b.parameters()) for b in aggregator.layout.buckets]
    aggregator.begin(0, {"used": used, "groups": [{}], "clip": NO_CLIP})
    with pytest.raises(ProtocolError, match=message):
        act(aggregator)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


def test_only_optimizers_that_may_be_stepped_in_pieces_are() -> None:
    class Foreign(torch.optim.SGD):
        """Not torch's own: might count its steps."""

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert steps_per_tensor(torch.optim.AdamW(parameters))
    assert not steps_per_tensor(torch.optim.LBFGS(parameters))
    assert not steps_per_tensor(Foreign(parameters, lr=0.1))


# -- a whole server in this process --------------------------------------------------------------------------


class _World:
    """A server thread and worker clients over ``inproc://``."""

    def __init__(
        self,
        num_workers: int,
        server_named: Any = None,
        timeout_s: float = 60.0,
        shared: bool = False,
        in_place: bool = False,
    ) -> None:
        self.shared, self.in_place = shared, in_place
        self.context: zmq.Context[Any] = zmq.Context()
        self.server_named = server_named or _named()
        self.error: BaseException | None = None
        self.num_workers, self.timeout_s = num_workers, timeout_s
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.router_mandatory = True
        self.socket.bind("inproc://server")
        self.sockets = [self.socket]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        optimizers = [_sgd(self.server_named)]
        tables = [self.server_named]
        self.server = server = SyncServer(
            *(self.socket, optimizers, tables, self.num_workers, self.timeout_s, 0.001, lambda: None, lambda _: None),
            shared=self.shared,
        )
        try:
            server.serve()
        except Exception as error:
            self.error = error

    def client(self, rank: int, named: Any) -> WorkerClient:
        socket = self.context.socket(zmq.DEALER)
        socket.routing_id = str(rank).encode()
        socket.connect("inproc://server")
        self.sockets.append(socket)
        sharing = self.num_workers if self.shared else None
        common = (socket, [named], rank, self.timeout_s, 0.001, Timeline())
        return WorkerClient(*common, sharing_workers=sharing, in_place=self.in_place)

    def start_two(self) -> tuple[list[Any], list[WorkerClient]]:
        """Two workers that have been welcomed, and their parameters."""
        named = [_named(), _named()]
        clients = [self.client(rank, named[rank]) for rank in range(2)]
        starts = [threading.Thread(target=client.start) for client in clients]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
        return named, clients

    def close(self) -> None:
        self.thread.join(self.timeout_s + 5)
        assert not self.thread.is_alive()
        for socket in self.sockets:
            socket.close(0)
        self.context.term()


@pytest.fixture(params=["socket", "shared", "in_place"])
def one_worker(request: pytest.FixtureRequest) -> Iterator[_World]:
    world = _World(1, shared=request.param != "socket", in_place=request.param == "in_place")
    yield world
    world.close()


def test_one_worker_equals_plain_training_to_the_bit(one_worker: _World) -> None:
    named, plain = _named(), _named()
    reference = _sgd(plain)
    client = one_worker.client(0, named)
    client.start()
    optimizer = RemoteOptimizer(_sgd(named), client, 0)
    for step in range(5):
        for (_, mine), (_, theirs) in zip(named, plain, strict=True):
            mine.grad = torch.full_like(mine, 0.1 * step)
            theirs.grad = mine.grad.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, plain, strict=True))
    saved = optimizer.state_dict()
    expected = reference.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(saved["state"][0]["momentum_buffer"], expected)
    assert saved["param_groups"][0]["lr"] == reference.param_groups[0]["lr"]
    client.bye()


def test_another_model_is_refused_by_the_first_different_name(one_worker: _World) -> None:
    other = _named()
    other[1] = ("bias", torch.nn.Parameter(torch.zeros(41)))
    with pytest.raises(ServerFailed, match=r"trains another model.*'bias', \[40\].*'bias', \[41\]"):
        one_worker.client(0, other).start()


def test_a_worker_that_does_not_push_is_named() -> None:
    world = _World(2)
    named, clients = world.start_two()
    world.server._timeout_s = 0.5
    for _, parameter in named[0]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ServerFailed, match=r"worker\(s\) 1 did not push"):
        clients[0].step(0, [{}], NO_CLIP)
    world.close()


def test_a_workers_error_reaches_the_others() -> None:
    world = _World(2)
    _, clients = world.start_two()
    clients[1].fail("ValueError: boom")
    with pytest.raises(ServerFailed, match="worker 1 failed: ValueError: boom"):
        clients[0].step(0, [{}], NO_CLIP)
    world.close()


def test_new_parameter_groups_are_refused_with_a_remedy(one_worker: _World) -> None:
    named = _named()
    client = one_worker.client(0, named)
    client.start()
    optimizer = RemoteOptimizer(_sgd(named), client, 0)
    with pytest.raises(ValueError, match="pass `growth`"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    client.bye()


# -- parameters in place -------------------------------------------------------------------------------------


def _step_both(named: list[Any], clients: list[WorkerClient]) -> None:
    for own in named:
        for _, parameter in own:
            parameter.grad = torch.ones_like(parameter)
    others = threading.Thread(target=clients[1].step, args=(0, [{}], NO_CLIP))
    others.start()
    clients[0].step(0, [{}], NO_CLIP)
    others.join()


def test_parameters_in_place_are_the_same_memory_until_they_are_released() -> None:
    """An edit of one worker is seen by the other: the price of it, and why it is off by default."""
    world = _World(2, shared=True, in_place=True)
    named, clients = world.start_two()
    weights = [own[0][1] for own in named]
    with torch.no_grad():
        weights[0][0, 0] = 7.0
    assert float(weights[1].detach()[0, 0]) == 7.0
    _step_both(named, clients)
    assert torch.equal(weights[0], weights[1])
    stepped = weights[0].detach().clone()
    for client in clients:
        client.release()
        client.bye()
    world.close()
    weights[0].detach().zero_()
    assert torch.equal(weights[1], stepped)


def test_a_backward_pass_through_values_from_before_a_step_in_place_is_an_error() -> None:
    world = _World(2, shared=True, in_place=True)
    named, clients = world.start_two()
    loss = named[0][0][1].square().sum() * named[0][2][1]
    _step_both(named, clients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    for client in clients:
        client.bye()
    world.close()


def test_a_parameter_in_place_is_saved_without_the_memory_of_the_others() -> None:
    world = _World(2, shared=True, in_place=True)
    named, clients = world.start_two()
    file = io.BytesIO()
    torch.save(named[0][2][1].detach(), file)
    assert file.tell() < 3000, "one number, not 4,964 bytes of all parameters"
    for client in clients:
        client.bye()
    world.close()
