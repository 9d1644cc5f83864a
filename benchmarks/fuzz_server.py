"""A real server under hostile messages: what it does with each, and what that leaves of the parameters."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import time
from collections import Counter
from typing import Any, final

import torch
import zmq
from fuzz_frames import Frames, Talk, make_server

from gradsync.comm.server import ProtocolError, WorkerFailed

NAMES = (b"0", b"1", b"7")
"""Under which messages come through a socket: of both workers, and of one that does not exist."""


@final
class _Wire:
    """A socket that holds one message."""

    def __init__(self) -> None:
        self.incoming: Frames = []

    def recv_multipart(self, copy: bool) -> list[Any]:
        return [zmq.Frame(frame) for frame in self.incoming]

    def send_multipart(self, frames: Any, copy: bool) -> None:
        pass


@final
class Victim:
    """A server in the middle of a conversation.

    A refused message would end the run; here the server stays, so that the next one meets it in the same place. One
    that it takes (a bit flipped in a learning rate may be one) moves it, so another is brought to where it was.

    Attributes:
        outcomes: How many messages were taken and refused.
        faults: What must not happen, by what it is.
        longest_s: Processor time of the longest one.
    """

    def __init__(self, kind: str, talk: Talk) -> None:
        self._kind = kind
        self._talk = talk
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.longest_s = 0.0
        self.restart(0)

    def restart(self, at: int) -> None:
        """With a new server, to which the first ``at`` messages of the conversation have been said."""
        self._wire = _Wire()
        self._server, self._parameters = make_server(self._kind, self._wire)
        for frames in self._talk[:at]:
            self._say(frames)

    def _say(self, frames: Frames) -> None:
        self._wire.incoming = frames
        self._server._receive()

    def values(self) -> torch.Tensor:
        """The parameters' bits."""
        return torch.cat([p.detach().reshape(-1).view(torch.int32) for p in self._parameters])

    def attack(self, at: int, frames: Frames) -> None:
        """Say ``frames`` before the message ``at``."""
        before, began = self.values(), time.thread_time()
        try:
            self._say(frames)
            outcome = "taken"
        except (ProtocolError, WorkerFailed) as error:
            outcome = "refused"
            self.faults["refused without a reason"] += not str(error)
            self.faults["parameters changed by what was refused"] += not torch.equal(before, self.values())
        except Exception as error:
            outcome = "crashed"
            self.faults[f"crash: {type(error).__name__}: {str(error)[:80]} on {frames!r:.300}"] += 1
        self._judge(time.thread_time() - began)
        self.outcomes[outcome] += 1
        if outcome != "refused" or (frames[1:2] and frames[1][:1] in _LEAVES_TRACES):
            self.restart(at)

    def _judge(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)
        self.faults["longer than 1 s"] += seconds > 1.0

    def go_on(self, at: int) -> None:
        """Say the message ``at`` of the conversation itself: it must be taken, whatever was refused before."""
        try:
            self._say(self._talk[at])
        except Exception as error:
            self.faults[f"no longer served: {type(error).__name__}: {str(error)[:120]}"] += 1
            self.restart(at + 1)


_LEAVES_TRACES = (b"\x01", b"\x0c")
"""*hello* and *fail*: whoever sends them has been heard, even where that ends the run."""


# -- a server in a process of its own ------------------------------------------------------------------------------


@final
class Target:
    """A server at a real socket, in the middle of a run, in a process whose death is noticed.

    Attributes:
        endpoint: On loopback.
    """

    def __init__(self, kind: str, talk: Talk, at: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._counts = mmap.mmap(-1, 8)  # shared with the fork
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(kind, talk, at, theirs, self._counts), daemon=True
        )
        self._process.start()
        self._pipe = ours
        self.endpoint: str = ours.recv()
        self.pid = self._process.pid or 0

    @property
    def num_seen(self) -> int:
        return int.from_bytes(self._counts[:8], "little")

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait_for(self, num_seen: int, limit_s: float) -> bool:
        """Whether so many messages were dealt with in time."""
        deadline = time.monotonic() + limit_s
        while self.num_seen < num_seen:
            if time.monotonic() > deadline or not self.is_alive:
                return False
            time.sleep(0)
        return True

    def end(self) -> tuple[Counter[str], Counter[str], float]:
        """Outcomes, faults and the longest time, as :class:`Victim` has them."""
        result: Any = (Counter(), Counter({"server process ended": 1}), 0.0)
        with contextlib.suppress(EOFError, OSError):
            self._pipe.send("end")
            result = self._pipe.recv() if self._pipe.poll(30) else result
        self._process.kill()
        self._process.join()
        self._counts.close()
        return result


def _serve(kind: str, talk: Talk, at: int, pipe: Any, counts: mmap.mmap) -> None:
    """The process of a :class:`Target`."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    pipe.send(f"tcp://127.0.0.1:{port}")
    victim = Victim(kind, talk)
    victim.restart(at)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(pipe.fileno(), zmq.POLLIN)
    num_seen = 0
    while pipe.fileno() not in (ready := dict(poller.poll())):
        if router in ready:
            frames = router.recv_multipart()
            victim.attack(at, frames)
            num_seen += frames[0] in NAMES  # others have come as bytes
            counts[:8] = num_seen.to_bytes(8, "little")
    pipe.send((victim.outcomes, victim.faults, victim.longest_s))
    os._exit(0)
