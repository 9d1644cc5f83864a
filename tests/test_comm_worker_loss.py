"""A server loses a worker after each of the messages that this sends in a run, and goes on with the others.

Without processes: messages reach the server one by one, in an order that a seed says.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor

from gradsync.comm.packing import tensor_bytes
from gradsync.comm.server import AsyncServer, ParameterServer, SyncServer, WorkerFailed
from gradsync.comm.server.layout import Layout
from gradsync.comm.server.ledger import Loss
from gradsync.comm.server.protocol import Kind, Message, table_of

NO_CLIP = {"algorithm": None, "value": 0.0}
PART_MIB = 0.001
WORKERS, STEPS, VICTIM = 3, 3, 2
GRADIENTS = (1.0, 2.0, 6.0)
"""Of each worker, everywhere: averages of two and of three of them differ."""


class _Wire:
    """The server's socket: what it is to receive, and what it has sent, by worker."""

    def __init__(self) -> None:
        self.incoming: deque[list[Any]] = deque()
        self.sent: dict[int, list[Message]] = {worker: [] for worker in range(WORKERS)}

    def recv_multipart(self, copy: bool) -> list[Any]:
        return [zmq.Frame(frame) for frame in self.incoming.popleft()]

    def send_multipart(self, frames: list[Any], copy: bool) -> None:
        self.sent[int(frames[0])].append(Message.parse([memoryview(bytearray(frame)) for frame in frames[1:]]))

    def answers(self, worker: int, kind: Kind) -> int:
        return sum(message.kind == kind for message in self.sent[worker])


class _Losses:
    def __init__(self) -> None:
        self.told: list[Loss] = []

    def find(self) -> Mapping[int, str]:
        return {}

    def tell(self, loss: Loss) -> None:
        self.told.append(loss)

    def close(self) -> None:
        return


class _Run:
    """Steps by ``- learning rate * gradient`` from zero; a worker pushes when its last push was answered."""

    def __init__(self, kind: type[ParameterServer], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.wire, self.losses = _Wire(), _Losses()
        shapes = {"weight": (40, 30), "bias": (40,), "scale": (1,)}
        self.named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
        parameters = [p for _, p in self.named]
        self.server = kind(
            *(self.wire, [torch.optim.SGD(parameters, lr=1.0)], [self.named], WORKERS, 60.0, PART_MIB),
            *(lambda: None, lambda _: None),
            losses=self.losses,
        )
        self.layout = Layout(parameters, PART_MIB)
        self.outbox: dict[int, deque[Message]] = {worker: deque() for worker in range(WORKERS)}
        self.begun = dict.fromkeys(range(WORKERS), 0)
        self.delivered = 0
        """Messages of the victim after its hello."""
        zeros = [
            Message(Kind.INIT, 0, bucket.index(), part, payload=tensor_bytes(torch.zeros(end - start)))
            for bucket, part, start, end in self.layout.all_parts()
        ]
        for worker in range(WORKERS):
            self._deliver(worker, Message(Kind.HELLO, info={"tables": [table_of(self.named)], "memory": None}))
        for message in zeros:
            self._deliver(0, message)

    def _deliver(self, worker: int, message: Message) -> None:
        self.wire.incoming.append([str(worker).encode(), *message.frames()])
        self.server._receive()

    def _step_of(self, worker: int) -> list[Message]:
        self.begun[worker] += 1
        used = [[True] * len(bucket.parameters()) for bucket in self.layout.buckets]
        info = {"used": used, "groups": [{"lr": 1.0}], "clip": NO_CLIP, "sequence": self.begun[worker], "samples": 8}
        info["samples"] *= self.begun[worker]
        pushes = [
            Message(
                *(Kind.PUSH, 0, bucket.index(), part),
                payload=tensor_bytes(torch.full((end - start,), GRADIENTS[worker])),
            )
            for bucket, part, start, end in self.layout.all_parts()
        ]
        return [Message(Kind.STEP, 0, info=info), *pushes]

    def _may_begin(self, worker: int) -> bool:
        answered = self.wire.answers(worker, Kind.DONE) == self.begun[worker]
        return not self.outbox[worker] and answered and self.begun[worker] < STEPS

    def go_on(self, lose_after: int | None) -> None:
        """Deliver what there is in some order; the victim is lost once ``lose_after`` of its messages were."""
        while True:
            if lose_after == self.delivered and not self.losses.told:
                self.server.lose(VICTIM, "was killed by SIGKILL")
            for worker in sorted(self.server.ledger.live):
                if self._may_begin(worker):
                    self.outbox[worker].extend(self._step_of(worker))
            waiting = [worker for worker in sorted(self.server.ledger.live) if self.outbox[worker]]
            if not waiting:
                return
            worker = self.random.choice(waiting)
            self._deliver(worker, self.outbox[worker].popleft())
            self.delivered += worker == VICTIM

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for _, p in self.named])


def _num_messages() -> int:
    run = _Run(SyncServer)
    run.go_on(None)
    return run.delivered


@pytest.mark.parametrize("seed", range(3))
def test_sync_averages_over_those_that_are_there(seed: int) -> None:
    of_all, of_two = sum(GRADIENTS) / 3, sum(GRADIENTS[:2]) / 2
    for lose_after in range(_num_messages() + 1):
        run = _Run(SyncServer, seed)
        run.go_on(lose_after)
        (loss,) = run.losses.told
        assert [run.wire.answers(worker, Kind.DONE) for worker in (0, 1)] == [STEPS, STEPS], lose_after
        # Whole steps with all three came before the loss; in the one under way, parts that were complete have all three
        before, after = loss.pushes, STEPS - loss.pushes
        possible = {-(before * of_all + after * of_two), -((before + 1) * of_all + (after - 1) * of_two)}
        values = set(run.flat().tolist())
        assert all(any(abs(value - p) < 1e-5 for p in possible) for value in values), (lose_after, values, possible)
        assert run.server.statistics.total_steps == STEPS
        assert run.server.ledger.applied == {0: STEPS, 1: STEPS, VICTIM: loss.pushes}
        assert loss.samples == 8 * loss.pushes


@pytest.mark.parametrize("seed", range(3))
def test_async_applies_every_push_once_or_not_at_all(seed: int) -> None:
    for lose_after in range(_num_messages() + 1):
        run = _Run(AsyncServer, seed)
        run.go_on(lose_after)
        ledger = run.server.ledger
        acknowledged = run.wire.answers(VICTIM, Kind.DONE)
        assert [ledger.applied[worker] for worker in (0, 1)] == [STEPS, STEPS]
        assert ledger.applied[VICTIM] == acknowledged  # nobody waits for others: who is applied is answered
        assert run.server.statistics.total_steps == sum(ledger.applied.values())
        expected = -sum(GRADIENTS[worker] * pushes for worker, pushes in ledger.applied.items())
        assert set(run.flat().tolist()) == {expected}


def test_what_a_lost_worker_sends_is_refused() -> None:
    run = _Run(SyncServer)
    late = run._step_of(VICTIM)
    run.server.lose(VICTIM, "said nothing for 5 s")
    for message in late:
        run._deliver(VICTIM, message)
    assert run.server.ledger.refused == len(late)
    assert "said nothing for 5 s" in run.wire.sent[VICTIM][-1].info["error"]
    run.go_on(None)
    assert set(run.flat().tolist()) == {-STEPS * sum(GRADIENTS[:2]) / 2}


def test_nobody_goes_on_without_the_first_worker() -> None:
    run = _Run(SyncServer)
    with pytest.raises(WorkerFailed, match="worker 0 was killed by SIGKILL"):
        run.server.lose(0, "was killed by SIGKILL")


def test_an_exception_in_a_worker_is_a_loss() -> None:
    run = _Run(AsyncServer)
    run._deliver(VICTIM, Message(Kind.FAIL, info={"error": "ArithmeticError: boom"}))
    assert [(loss.worker, loss.reason) for loss in run.losses.told] == [(VICTIM, "failed: ArithmeticError: boom")]
    run.go_on(None)
    assert run.server.statistics.total_steps == 2 * STEPS


def test_whoever_leaves_first_is_not_waited_for() -> None:
    """A process that is new in a lost one's place may stop by metrics of its own."""
    run = _Run(SyncServer)
    run._deliver(1, Message(Kind.BYE, info={"info": None, "tree": {"value": None}}))
    for worker in (0, VICTIM):
        for message in run._step_of(worker):
            run._deliver(worker, message)
    assert [run.wire.answers(worker, Kind.DONE) for worker in (0, VICTIM)] == [1, 1]
    run._deliver(0, Message(Kind.BYE, info={"info": None, "tree": {"value": None}}))
    for message in run._step_of(VICTIM):
        run._deliver(VICTIM, message)
    assert run.wire.answers(VICTIM, Kind.DONE) == 2
    assert set(run.flat().tolist()) == {-(GRADIENTS[0] + GRADIENTS[VICTIM]) / 2 - GRADIENTS[VICTIM]}


def test_a_step_without_gradients_does_not_wait_for_who_has_left() -> None:
    run = _Run(SyncServer)
    run._deliver(1, Message(Kind.BYE, info={"info": None, "tree": {"value": None}}))
    for worker in (0, VICTIM):
        announcement = run._step_of(worker)[0]
        announcement.info["used"] = [[False] * len(flags) for flags in announcement.info["used"]]
        run._deliver(worker, announcement)
    assert [run.wire.answers(worker, Kind.DONE) for worker in (0, VICTIM)] == [1, 1]
