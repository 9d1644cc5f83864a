"""``wire_dtype`` without processes: what travels is rounded, what is kept is not, and nothing is lost silently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq

from gradsync.comm import Timeline
from gradsync.comm.server import AsyncServer, ServerFailed, SyncServer, WorkerClient

PART_MIB = 0.001
NO_CLIP = {"algorithm": None, "value": 0.0}
Named = list[tuple[str, torch.Tensor]]
Gradient = Callable[[int, int, torch.Tensor], torch.Tensor]


def _named(double: bool = False) -> Named:
    """A tensor of several parts, two that share one, and one of another dtype that is never narrowed."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (40, 30), "bias": (40,), "scale": (1,)}
    named = [(n, torch.randn(s, generator=generator)) for n, s in shapes.items()]
    named.append(("half", torch.randn(7, generator=generator).half()))
    return [(n, torch.nn.Parameter(t.double() if double and t.dtype == torch.float32 else t)) for n, t in named]


def _gradient(worker: int, step: int, parameter: torch.Tensor) -> torch.Tensor:
    """Depends on the worker's own parameters, so that what they were rounded to shows."""
    return torch.sin(parameter.detach() * (worker + 2)) / (step + 3)


class _Run:
    """A server thread and workers over ``inproc://``."""

    def __init__(
        self,
        num_workers: int,
        wire_dtype: torch.dtype | None,
        shared: bool,
        kind: str = "sync",
        server_wire_dtype: torch.dtype | str | None = "the same",
        lr: float = 0.1,
        double: bool = False,
    ) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.served = _named(double)
        self.replicas = [_named(double) for _ in range(num_workers)]
        socket = self.context.socket(zmq.ROUTER)
        socket.bind("inproc://server")
        self.sockets = [socket]
        optimizer = torch.optim.SGD([p for _, p in self.served], lr=lr, momentum=0.9)
        server_type = SyncServer if kind == "sync" else AsyncServer
        self.server = server_type(
            *(socket, [optimizer], [self.served], num_workers, 60.0, PART_MIB, lambda: None, lambda _: None),
            shared=shared,
            wire_dtype=wire_dtype if server_wire_dtype == "the same" else server_wire_dtype,
        )
        self.clients = [
            self._client(rank, shared, wire_dtype, kind == "sync", num_workers) for rank in range(num_workers)
        ]
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def start(self) -> None:
        self.together(lambda client: client.start())

    def _client(self, rank: int, shared: bool, wire_dtype: Any, in_lockstep: bool, num_workers: int) -> WorkerClient:
        socket = self.context.socket(zmq.DEALER)
        socket.routing_id = str(rank).encode()
        socket.connect("inproc://server")
        self.sockets.append(socket)
        self.timeline = Timeline()
        return WorkerClient(
            *(socket, [self.replicas[rank]], rank, 60.0, PART_MIB, self.timeline, None),
            *(num_workers if shared else None, in_lockstep, wire_dtype),
        )

    def _serve(self) -> None:
        try:
            self.server.serve()
        except Exception as error:
            self.error = error

    def together(self, act: Callable[[WorkerClient], Any]) -> None:
        """Act in all workers at the same time; raises the first worker's error."""
        errors: list[Exception] = []

        def safely(rank: int) -> None:
            try:
                act(self.clients[rank])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=safely, args=(rank,)) for rank in range(len(self.clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def step(self, number: int, gradient: Gradient = _gradient) -> None:
        for rank, named in enumerate(self.replicas):
            for _, parameter in named:
                parameter.grad = gradient(rank, number, parameter)
        self.together(lambda client: client.step(0, [{}], NO_CLIP))

    def close(self) -> None:
        self.thread.join(10)
        for socket in self.sockets:
            socket.close(0)
        self.context.term()


@pytest.fixture
def run() -> Iterator[Callable[..., _Run]]:
    """Makes runs; they are closed at the end."""
    made: list[_Run] = []

    def make(*args: Any, **options: Any) -> _Run:
        made.append(_Run(*args, **options))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.together(lambda client: client.bye({}, {}))
        each.close()


def _values(named: Named) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in named]


def _assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def _round(tensor: torch.Tensor, wire_dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float16 else tensor.to(wire_dtype).to(tensor.dtype)


def _oracle(num_workers: int, wire_dtype: torch.dtype, num_steps: int, double: bool) -> list[list[torch.Tensor]]:
    """Masters and replicas after training in one process: round, then average in worker order, step, round."""
    masters = [p for _, p in _named(double)]
    optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    for step in range(num_steps):
        replicas = [_round(p.detach(), wire_dtype) for p in masters]
        for master, replica in zip(masters, replicas, strict=True):
            sent = [_round(_gradient(worker, step, replica), wire_dtype) for worker in range(num_workers)]
            master.grad = sent[0] * (1.0 / num_workers)
            for term in sent[1:]:
                master.grad.add_(term, alpha=1.0 / num_workers)
        optimizer.step()
    return [[p.detach() for p in masters], [_round(p.detach(), wire_dtype) for p in masters]]


@pytest.mark.parametrize("shared", [False, True], ids=["socket", "shared"])
@pytest.mark.parametrize(
    ("num_workers", "wire_dtype", "double"),
    [
        *((1, torch.bfloat16, False), (2, torch.bfloat16, False), (3, torch.bfloat16, False)),
        *((2, torch.float16, False), (2, torch.float32, True), (2, torch.bfloat16, True)),
    ],
)
def test_sync_steps_are_those_of_one_process_that_rounds(
    run: Callable[..., _Run], num_workers: int, wire_dtype: torch.dtype, double: bool, shared: bool
) -> None:
    ours = run(num_workers, wire_dtype, shared, double=double)
    for step in range(4):
        ours.step(step)
    masters, replicas = _oracle(num_workers, wire_dtype, 4, double)
    # what is float16 anyway is averaged as without wire_dtype: in shared memory by the workers, each rounding a third
    kept = slice(0, 3 if shared and num_workers == 3 else 4)
    _assert_same(_values(ours.served)[kept], masters[kept])
    for named in ours.replicas:
        _assert_same(_values(named)[kept], replicas[kept])


@pytest.mark.parametrize("shared", [False, True], ids=["socket", "shared"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_parameters_own_dtype_changes_nothing(run: Callable[..., _Run], kind: str, shared: bool) -> None:
    num_workers = 3 if kind == "sync" else 1
    results = []
    for wire_dtype in (None, torch.float32):
        ours = run(num_workers, wire_dtype, shared, kind)
        for step in range(3):
            ours.step(step)
        results.append(_values(ours.served))
        _assert_same(_values(ours.replicas[0]), results[-1])
    _assert_same(*results)


@pytest.mark.parametrize("shared", [False, True], ids=["socket", "shared"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_is_fetched_is_what_the_server_has_and_what_is_trained_on_is_rounded(
    run: Callable[..., _Run], kind: str, shared: bool
) -> None:
    ours = run(1, torch.bfloat16, shared, kind)
    initial = _values(_named())
    _assert_same(_values(ours.served), initial)  # they came unrounded
    _assert_same(_values(ours.replicas[0]), [_round(p, torch.bfloat16) for p in initial])
    ours.step(0)
    rounded = [_round(p, torch.bfloat16) for p in _values(ours.served)]
    _assert_same(_values(ours.replicas[0]), rounded)
    ours.clients[0].fetch(exact=True)
    _assert_same(_values(ours.replicas[0]), _values(ours.served))
    ours.clients[0].fetch()
    _assert_same(_values(ours.replicas[0]), rounded)
    assert not torch.equal(_values(ours.served)[0], rounded[0])


@pytest.mark.parametrize("shared", [False, True], ids=["socket", "shared"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_bytes_halve_on_both_sides(run: Callable[..., _Run], kind: str, shared: bool) -> None:
    counted = []
    for wire_dtype in (None, torch.bfloat16):
        ours = run(1, wire_dtype, shared, kind)
        statistics = ours.server.statistics
        before = statistics.received_bytes + statistics.sent_bytes
        ours.step(0)
        step = ours.timeline.take_step()
        assert step is not None
        counted.append((step.num_bytes, statistics.received_bytes + statistics.sent_bytes - before))
    narrowed, kept = 40 * 30 + 40 + 1, 7
    assert counted == [(2 * (4 * narrowed + 2 * kept),) * 2, (2 * (2 * narrowed + 2 * kept),) * 2]


def test_both_sides_must_agree(run: Callable[..., _Run]) -> None:
    with pytest.raises(ServerFailed, match=r"server has \['weight'.*float32'\], worker has .*'torch.bfloat16'\]"):
        run(1, torch.bfloat16, False, server_wire_dtype=None)


# -- nothing is lost silently --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["socket", "shared"])
@pytest.mark.parametrize(("name", "position"), [("weight", 0), ("bias", 1), ("scale", 2)])
def test_a_gradient_that_float16_cannot_hold_is_refused_by_name(
    run: Callable[..., _Run], name: str, position: int, shared: bool
) -> None:
    ours = run(1, torch.float16, shared)
    parameters = [p for _, p in ours.replicas[0]]

    def gradient(worker: int, step: int, parameter: torch.Tensor) -> torch.Tensor:
        grad = torch.ones_like(parameter)
        if parameter is parameters[position]:
            grad.view(-1)[-1] = 7e4
        return grad

    with pytest.raises(ValueError, match=rf"parameter '{name}': 7e\+04.*wire_dtype float16: use bfloat16"):
        ours.step(0, gradient)


def test_infinities_that_were_there_before_pass_as_without_rounding(run: Callable[..., _Run]) -> None:
    ours = run(1, torch.float16, False)
    ours.step(0, lambda worker, step, p: torch.full_like(p, torch.inf))
    assert not torch.isfinite(_values(ours.served)[0]).any()


def test_a_parameter_that_float16_cannot_hold_is_refused_by_name(run: Callable[..., _Run]) -> None:
    ours = run(1, torch.float16, False, lr=1e4)
    with pytest.raises(ServerFailed, match=r"parameter 'weight': .* too large for .*wire_dtype float16"):
        ours.step(0, lambda worker, step, p: torch.full_like(p, 100.0 if p.numel() == 1200 else 0.0))


def test_a_value_to_start_from_that_float16_cannot_hold_is_refused_by_name(run: Callable[..., _Run]) -> None:
    ours = run(1, torch.float16, False)
    with torch.no_grad():
        ours.served[1][1][3] = 1e5
    ours.clients[0].fetch(exact=True)
    with pytest.raises(ValueError, match=r"parameter 'bias': 1e\+05"):
        ours.clients[0].round()


def test_a_gradient_of_which_nothing_is_left_is_told_once(run: Callable[..., _Run]) -> None:
    ours = run(1, torch.float16, False)
    client = ours.clients[0]
    for _, parameter in ours.replicas[0]:
        parameter.grad = torch.full_like(parameter, 1e-9)
    with pytest.warns(UserWarning, match="all of the gradient of parameter .* is too small") as warned:
        client.step(0, [{}], NO_CLIP)
    assert len(warned) == 1
    client.step(0, [{}], NO_CLIP)
