"""A worker's side of the parameter server: see :mod:`.protocol` for the phases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, final

import torch
import zmq
from torch import Tensor

from ..buckets import Bucket, make_buckets, view_like
from ..packing import pack_tree, tensor_bytes, tensor_from, unpack_tree
from ..timeline import Timeline
from .growth import Joining, values_of
from .in_place import InPlace
from .layout import Layout, flat_alias
from .peers import ExchangeFailed, Peers
from .protocol import Kind, Message, ProtocolError, table_of
from .shared_buckets import SharedBuffers, attach
from .wire import check_gradients, exact_bytes, make_buffers, round_in_place, warn_of_underflow

_GRACE_S = 5.0
"""A worker waits this much longer than the server, which knows better whom to blame."""


class ServerFailed(Exception):
    """The server reported an error (its text names the culprit) or does not answer."""


@final
class WorkerClient:
    """Pushes gradients, pulls parameters. Everything here blocks, on the calling worker only.

    Args:
        socket: Connected DEALER whose routing id is the worker's rank. The caller closes it.
        named_parameters: Per optimizer, its parameters with their names. They are overwritten by :meth:`step`.
        rank: This worker's; rank 0 says what the run starts from.
        timeout_s: Seconds to wait for an answer.
        part_mib: Message size in MiB, as the server's.
        timeline: Where the spans go.
        peers: Move gradients and parameters instead of the socket, if given.
        sharing_workers: If given, tensors go through memory that the server shares with so many workers, all of them.
        in_lockstep: Whether all workers take part in every step (sync mode).
        wire_dtype: In which gradients and parameters travel, as the server's; see :class:`.Layout`. Parameters are
            rounded to it, from :meth:`start` on.
        divides: Whether gradients in shared memory are divided by the number of workers here, in sync mode; else the
            server does it, which knows how many are left.
        in_place: Parameters live in the server's memory until :meth:`release`; in sync mode with shared memory only.

    Raises:
        SharedMemoryError: there is too little memory for that.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        named_parameters: list[list[tuple[str, Tensor]]],
        rank: int,
        timeout_s: float,
        part_mib: float,
        timeline: Timeline,
        peers: Peers | None = None,
        sharing_workers: int | None = None,
        in_lockstep: bool = True,
        wire_dtype: torch.dtype | None = None,
        in_place: bool = False,
        divides: bool = True,
    ) -> None:
        self._socket = socket
        self._named = named_parameters
        self._names = {p: name for named in named_parameters for name, p in named}
        self._wire_dtype = wire_dtype
        self._warned = False
        num_makers = self._num_makers = (sharing_workers or 0) + 1
        self._shared = [SharedBuffers(num_makers) for _ in named_parameters] if sharing_workers else None
        allocators = [s.allocate for s in self._shared] if self._shared else [make_buffers] * len(named_parameters)
        self._layouts = [
            Layout([p for _, p in named], part_mib, allocate, wire_dtype)
            for named, allocate in zip(named_parameters, allocators, strict=True)
        ]
        self._inboxes = [SharedBuffers(num_makers) for _ in self._shared or []] if not in_lockstep else []
        self._values: list[list[Bucket]] = []
        """Per optimizer, where new parameters are read in shared memory: the server's own, or this worker's inbox."""
        self._is_in_place = in_place
        self._in_place: list[InPlace] = []
        self._scale = 1.0 / sharing_workers if sharing_workers and in_lockstep and divides else 1.0
        self._num_steps = 0
        self.version = 0
        """Steps of all workers that these parameters have seen; counted in async and bounded mode."""
        self.number = 0
        """Of the server, for traces."""
        self.num_samples: int | None = None
        """That went into this worker's gradients since it began, for the server's ledger."""
        self.admits: list[int] = []
        """Workers whose new processes take part from the coming step on; rank 0 says so."""
        self._rank = rank
        self._timeout_s = timeout_s + _GRACE_S
        self._timeline = timeline
        self._peers = peers
        self._early: Message | None = None

    def start(self) -> None:
        """Phases *hello* and *init*: agree on the model; rank 0 sends the values to start from."""
        tables = [table_of(named, self._wire_dtype) for named in self._named]
        self._send(Message(Kind.HELLO, info={"tables": tables, "memory": self._make_memory()}))
        if self._rank == 0:
            for number, layout in enumerate(self._layouts):
                for bucket, part, start, end in layout.all_parts():
                    if layout.is_narrowed(bucket):
                        payload = exact_bytes(bucket, start, end)
                    else:
                        payload = self._payload(bucket, bucket.parameters(), start, end, scale=1.0)
                    self._send(Message(Kind.INIT, number, bucket.index(), part, payload=payload))
        welcome = self._expect(Kind.WELCOME).info
        self._attach(welcome["memory"])
        self._num_steps = welcome["steps"]
        self.round()

    def round(self) -> None:
        """So that a worker computes with what it would have after a step, whatever it had before."""
        for layout in self._layouts:
            round_in_place(layout, self._names)

    def _make_memory(self) -> dict[str, Any] | None:
        """Where the server finds this worker's buffers."""
        if not self._shared:
            return None
        for layout, inbox in zip(self._layouts, self._inboxes, strict=False):
            self._values.append(_buckets_in(layout, inbox.allocate(layout.specs)))
        return {"pushed": [s.handle() for s in self._shared], "inbox": [i.handle() for i in self._inboxes]}

    def _attach(self, memory: list[dict[str, Any]] | None) -> None:
        """The server has mapped our memory; map its own, if that is where parameters are read."""
        for buffers in [*(self._shared or []), *self._inboxes]:
            buffers.seal()
        if self._shared and not self._inboxes:
            handles = zip(self._layouts, memory or [], strict=True)
            self._values = [_buckets_in(layout, attach(handle, layout.specs)) for layout, handle in handles]
        if self._is_in_place:
            self._in_place = [InPlace(buckets) for buckets in self._values]

    def step(self, number: int, groups: list[dict[str, Any]], clip: dict[str, Any]) -> None:
        """Phase *step* for optimizer ``number``: on return its parameters are the new ones.

        Args:
            number: Index of the optimizer.
            groups: The JSON-compatible settings of its parameter groups (learning rates).
            clip: ``{"algorithm": "norm" | "value" | None, "value": float}``, applied to the average.
        """
        step_together([self], number, groups, clip, self._timeline)

    def push(self, number: int, groups: list[dict[str, Any]], clip: dict[str, Any]) -> int:
        """First half of :meth:`step`: hand over the gradients; returns the bytes."""
        layout = self._layouts[number]
        self._check_gradients(number)
        used = [[p.grad is not None for p in bucket.parameters()] for bucket in layout.buckets]
        self._num_steps += 1
        info = {"used": used, "groups": groups, "clip": clip, "sequence": self._num_steps}
        if self.num_samples is not None:
            info["samples"] = self.num_samples
        if self.admits:
            info["admits"], self.admits = self.admits, []
        if self._timeline.tracer.recorder is not None:
            info["recorded"] = True
        self._send(Message(Kind.STEP, number, info=info))
        return self._push(number, used) if self._peers is None else self._push_pull(self._peers, layout)

    def _push_pull(self, peers: Peers, layout: Layout) -> int:
        try:
            return peers.push_pull(layout.buckets, self._look)
        except ExchangeFailed as error:
            if self._early is None and not self._socket.poll(int(_GRACE_S * 1000)):  # the server knows who has gone
                raise ServerFailed(f"the exchange with the parameter server broke off: {error}") from error
            self._receive()
            raise

    def _look(self) -> None:
        """Raise if the server has failed, while the answer is awaited elsewhere."""
        if self._early is None and self._socket.poll(0):
            self._early = self._receive()

    def fetch(self, exact: bool = False) -> None:
        """Take over the server's current parameters, of all optimizers, ``exact``: not rounded as after a step."""
        for number in range(len(self._layouts)):
            self._send(Message(Kind.FETCH, number))
            self.pull(number, are_exact=True)
        if not exact:
            self.round()

    def grow(self, number: int, joining: Joining) -> None:
        """Phase *grow*: ``joining`` travels with optimizer ``number`` from the next step on."""
        layout, first = self._layouts[number], len(self._layouts[number].buckets)
        kinds = ("pushed", "inbox") if self._inboxes else ("pushed",)
        memory = {kind: SharedBuffers(self._num_makers) for kind in kinds} if self._shared and joining.trains else {}
        self._named[number] += joining.named
        self._names |= {p: name for name, p in joining.named}
        new = layout.extend([p for _, p in joining.named], memory["pushed"].allocate if memory else make_buffers)
        specs = layout.specs[first:]
        values = memory["inbox"].allocate(specs) if "inbox" in memory else None
        handles = {kind: buffers.handle() for kind, buffers in memory.items()} or None
        self._send(Message(Kind.GROW, number, info={**joining.request(), "memory": handles}, payload=values_of(new)))
        handle = self._expect(Kind.GROWN).info
        for buffers in memory.values():
            buffers.seal()
        if memory:
            values = attach(handle, specs) if values is None else values
            self._values[number] += make_buckets([bucket.parameters() for bucket in new], values, first)
        if self._in_place:
            self._in_place[number].extend(self._values[number][first:])
        self.round()

    def get_state(self, number: int) -> dict[str, Any]:
        """The state dict of optimizer ``number`` on the server."""
        self._send(Message(Kind.GET_STATE, number))
        reply = self._expect(Kind.STATE)
        return unpack_tree(reply.info, reply.payload)

    def set_state(self, number: int, state: dict[str, Any]) -> None:
        """Load ``state`` into optimizer ``number`` on the server; returns when it is in force."""
        info, payload = pack_tree(state)
        self._send(Message(Kind.SET_STATE, number, info=info, payload=payload))
        self._expect(Kind.STATE)

    def bye(self, info: Any = None, tree: Any = None) -> None:
        """Leave. Rank 0's ``info`` (JSON) and ``tree`` (may hold tensors) reach whoever runs the server."""
        description, payload = pack_tree(tree)
        self._send(Message(Kind.BYE, info={"info": info, "tree": description}, payload=payload))

    def release(self) -> None:
        """Parameters that live in the server's memory get their own; nothing else uses it afterwards."""
        for in_place in self._in_place:
            in_place.release()
        self._in_place = []

    def fail(self, error: str) -> None:
        """Tell the server that this worker ends with ``error``; never blocks."""
        self._socket.send_multipart(Message(Kind.FAIL, info={"error": error}).frames(), zmq.DONTWAIT)

    # -- messages --------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        self._socket.send_multipart(message.frames(), copy=False)

    def _receive(self) -> Message:
        if self._early is not None:
            message, self._early = self._early, None
            return message
        if not self._socket.poll(int(self._timeout_s * 1000)):
            raise ServerFailed(
                f"the parameter server did not answer worker {self._rank} within {self._timeout_s:g} s; "
                "--trainer.strategy.step_timeout_s raises the limit"
            )
        message = Message.parse([frame.buffer for frame in self._socket.recv_multipart(copy=False)])
        if message.kind == Kind.FAIL:
            raise ServerFailed(message.info["error"])
        return message

    def _expect(self, kind: Kind) -> Message:
        message = self._receive()
        if message.kind != kind:
            raise ProtocolError(f"expected {kind.name} from the server, got {message.kind.name}")
        return message

    # -- phase: step -----------------------------------------------------------------------------------------

    def _check_gradients(self, number: int) -> None:
        """Refuse by name what the server could not apply: it would be lost silently."""
        sparse = [name for name, p in self._named[number] if p.grad is not None and p.grad.is_sparse]
        if sparse:
            raise ValueError(f"parameter {sparse[0]!r} has a sparse gradient: use a dense layer or another strategy")
        known = {p for bucket in self._layouts[number].buckets for p in bucket.parameters()}
        lost = [name for name, p in self._named[number] if p.grad is not None and p not in known]
        if lost:
            raise ValueError(
                f"parameter {lost[0]!r} was frozen when the run began and has a gradient now, but the server was not "
                "asked to take it in"
            )

    def _push(self, number: int, used: list[list[bool]]) -> int:
        """Send the gradients of all buckets that have any; returns the bytes."""
        num_bytes = 0
        for bucket, part, start, end in self._layouts[number].all_parts():
            if any(used[bucket.index()]):
                gradients = [p.grad for p in bucket.parameters()]
                with self._timeline.tracer.part("push", bucket=bucket.index(), part=part, server=self.number):
                    is_narrowed = self._layouts[number].is_narrowed(bucket)
                    payload = self._payload(bucket, gradients, start, end, 1.0 if is_narrowed else self._scale)
                    if is_narrowed and (lost := check_gradients(bucket, gradients, start, end, self._names)):
                        self._warn_once(lost)
                    self._send(Message(Kind.PUSH, number, bucket.index(), part, payload=payload))
                num_bytes += (end - start) * bucket.buffer().element_size()
        return num_bytes

    def _warn_once(self, name: str) -> None:
        if not self._warned:
            warn_of_underflow(name, self._wire_dtype)
        self._warned = True

    @torch.no_grad()
    def _payload(self, bucket: Bucket, tensors: list[Any], start: int, end: int, scale: float) -> memoryview | None:
        """Bytes of part ``[start, end)`` of ``tensors`` (None: zeros) in the bucket's order.

        None if they are, scaled, in shared memory now. Else a lone tensor is sent from where it lives: nothing
        changes it before the server has answered.
        """
        flat = flat_alias(tensors[0], bucket.parameters()[0]) if len(tensors) == 1 else None
        if flat is not None and not self._shared and flat.dtype == bucket.buffer().dtype:
            return tensor_bytes(flat[start:end].cpu())
        if flat is not None:
            torch.mul(flat[start:end], scale, out=bucket.buffer()[start:end])
        elif start == 0:
            for view, tensor in zip(bucket.views, tensors, strict=True):
                view.zero_() if tensor is None else torch.mul(tensor, scale, out=view)
        return None if self._shared else tensor_bytes(bucket.buffer()[start:end].cpu())

    def pull(self, number: int, are_exact: bool = False) -> tuple[int, int, dict[str, float]]:
        """Second half of :meth:`step`: take new parameters, ``are_exact``: not rounded, until *done*.

        Returns the time of the first reply in ns, the bytes, and the server's times.
        """
        first_ns = num_bytes = 0
        tracer = self._timeline.tracer
        while True:
            with tracer.part("wait", server=self.number):
                message = self._receive()
            first_ns = first_ns or time.perf_counter_ns()
            if message.kind == Kind.DONE:
                self.version = message.info.get("version", self.version)
                return first_ns, num_bytes, message.info
            if message.kind != Kind.PULL or message.optimizer != number:
                raise ProtocolError(f"expected PULL from the server, got {message.kind.name}")
            with tracer.part("pull", bucket=message.bucket, part=message.part, server=self.number):
                num_bytes += self._store(number, message, are_exact)

    @torch.no_grad()
    def _store(self, number: int, message: Message, is_exact: bool) -> int:
        """Take over the new parameters of one part; returns its bytes."""
        layout = self._layouts[number]
        bucket = layout.buckets[message.bucket]
        start, end = layout.parts(bucket)[message.part]
        if self._in_place:
            self._in_place[number].take_over(message.bucket)
            return 0
        if self._shared and not (is_exact and layout.is_narrowed(bucket)):
            self._copy(bucket, self._values[number][message.bucket], start, end)
        else:
            dtype = bucket.parameters()[0].dtype if is_exact else bucket.buffer().dtype
            self._unpack(bucket, tensor_from(message.payload, dtype), start, end)
        return (end - start) * bucket.buffer().element_size()

    @staticmethod
    def _copy(bucket: Bucket, values: Bucket, start: int, end: int) -> None:
        parameters = bucket.parameters()
        flat = flat_alias(parameters[0], parameters[0]) if len(parameters) == 1 else None
        if flat is not None:
            flat[start:end].copy_(values.buffer()[start:end])
            return
        for parameter, view in zip(parameters, values.views, strict=True):
            parameter.copy_(view)

    @staticmethod
    def _unpack(bucket: Bucket, values: Tensor, start: int, end: int) -> None:
        if len(values) != end - start:
            raise ProtocolError(f"server sent {len(values)} values for bucket {bucket.index()}, expected {end - start}")
        parameters = bucket.parameters()
        flat = flat_alias(parameters[0], parameters[0]) if len(parameters) == 1 else None
        if flat is not None:
            flat[start:end].copy_(values)
            return
        for parameter, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(view_like(part, parameter))


def _buckets_in(layout: Layout, buffers: list[Tensor]) -> list[Bucket]:
    return make_buckets([bucket.parameters() for bucket in layout.buckets], buffers)


def step_together(
    clients: Sequence[WorkerClient], number: int, groups: list[dict[str, Any]], clip: dict[str, Any], timeline: Timeline
) -> None:
    """One step of optimizer ``number`` with all servers at once, and what it cost: see :meth:`WorkerClient.step`."""
    timeline.gradients_ready()
    start_ns = time.perf_counter_ns()
    num_bytes = sum(client.push(number, groups, clip) for client in clients)
    pushed_ns = time.perf_counter_ns()
    pulls = [client.pull(number) for client in clients]
    end_ns = time.perf_counter_ns()
    timeline.synchronized()
    first_ns = min(first for first, _, _ in pulls)
    slowest = {name: max(times[name] for _, _, times in pulls) for name in pulls[0][2]}
    num_bytes += sum(pulled for _, pulled, _ in pulls)
    timeline.add_span(start_ns, end_ns, num_bytes, "exchange", server_optimizer_ms=slowest["optimizer_ms"])
    push_ms = max((pushed_ns - start_ns) / 1e6, slowest["receive_ms"])
    pull_ms = (end_ns - first_ns) / 1e6
    timeline.add_parts(
        push_ms=push_ms,
        pull_ms=pull_ms,
        wait_ms=max(0.0, (end_ns - start_ns) / 1e6 - push_ms - pull_ms - slowest["optimizer_ms"]),
        server_optimizer_ms=slowest["optimizer_ms"],
        **{name: slowest[name] for name in ("staleness",) if name in slowest},
    )
