"""Phase *grow*: parameters and parameter groups that join an optimizer between two steps.

Nothing that is there moves: what joins gets buckets after the others, and groups after the others. The first worker
that asks changes the server's optimizer and gives the values to start from; frozen parameters are the same on all
workers. Later requests must be the same, worker by worker in the same order; until a worker has asked it goes on
pushing what it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buckets import Bucket, is_dense
from ..packing import tensor_from
from .checks import check_settings
from .protocol import ProtocolError
from .served import ServedOptimizer, update_group
from .shards import Cut, Piece
from .shared_buckets import SharedBuffers
from .wire import exact_bytes


@final
@dataclass(frozen=True)
class Joining:
    """What joins one optimizer on one server.

    Attributes:
        unfrozen: Parameters of the optimizer that were frozen so far.
        groups: New parameter groups: their settings (JSON) and what this server serves of them.
    """

    unfrozen: list[tuple[str, Piece]]
    groups: list[tuple[dict[str, Any], list[tuple[str, Piece]]]]

    @property
    def trains(self) -> bool:
        """Whether there is anything to step in it."""
        return any(p.requires_grad for _, p in self.named)

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """All of it, with the names of whole parameters."""
        pieces = [*self.unfrozen, *(row for _, rows in self.groups for row in rows)]
        return [(name, piece.tensor) for name, piece in pieces]

    def request(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "unfrozen": [_row(*pair) for pair in self.unfrozen],
            "groups": [{"settings": s, "rows": [_row(*pair) for pair in pairs]} for s, pairs in self.groups],
        }


def _row(name: str, piece: Piece) -> list[Any]:
    p, cut = piece.parameter, piece.cut
    return [name, list(p.shape), list(p.stride()), str(p.dtype), piece.tensor.requires_grad, cut.start, cut.end]


def values_of(buckets: Sequence[Bucket]) -> bytes:
    """The parameters of ``buckets`` as they are held, in their order."""
    return b"".join(bytes(exact_bytes(bucket, 0, bucket.buffer().numel())) for bucket in buckets)


@final
class Growths:
    """Server: what has joined its optimizers so far, and who has asked for it.

    Args:
        served: The optimizers.
        by_name: All parameters of the module; only these can join.
    """

    def __init__(self, served: Sequence[ServedOptimizer], by_name: Mapping[str, Tensor]) -> None:
        self._served = served
        self._by_name = by_name
        self._requests: list[list[dict[str, Any]]] = [[] for _ in served]
        self._memory: list[list[SharedBuffers | None]] = [[] for _ in served]
        self._num_taken: dict[tuple[int, int], int] = {}

    def missing(self, worker: int, number: int) -> list[str]:
        """Names of what others train with optimizer ``number`` and ``worker`` does not know of."""
        requests = self._requests[number][self._num_taken.get((worker, number), 0) :]
        return [row[0] for request in requests for row in _rows(request)]

    def forget(self, worker: int) -> None:
        """Another process will take its place, and ask for everything again."""
        self._num_taken = {key: taken for key, taken in self._num_taken.items() if key[0] != worker}

    def is_new(self, worker: int, number: int, request: dict[str, Any]) -> bool:
        """Whether nobody has asked for this before.

        Raises:
            ProtocolError: others have asked for something else at this point.
        """
        taken = self._num_taken.get((worker, number), 0)
        if taken == len(self._requests[number]):
            return True
        earlier = self._requests[number][taken]
        if request != earlier:
            mine, theirs = ({row[0] for row in _rows(r)} for r in (request, earlier))
            differing = sorted(mine ^ theirs) or sorted(mine)
            raise ProtocolError(
                f"worker {worker} unfreezes other parameters, or with other settings, than another worker did "
                f"({', '.join(differing[:3])}): unfreeze the same on all workers, in the same order"
            )
        return False

    def check(self, worker: int, number: int, request: dict[str, Any], num_bytes: int) -> Joining:
        """What a new request asks for. Changes nothing.

        Raises:
            ProtocolError: it cannot be had.
        """
        served = self._served[number]
        rows = [tuple(row[:1] + row[5:6]) for row in _rows(request)]
        if len(set(rows)) < len(rows):
            raise ProtocolError(f"worker {worker} lets a parameter join twice")
        trained = {p for bucket in served.layout.buckets for p in bucket.parameters()}
        own = {p for group in served.optimizer.param_groups for p in group["params"]}
        free = set(self._by_name.values()) - own
        joining = Joining(
            [self._find(worker, row, own - trained) for row in request["unfrozen"]],
            [
                (group["settings"], [self._find(worker, row, free) for row in group["rows"]])
                for group in request["groups"]
            ],
        )
        trainable = [row for row in _rows(request) if row[4]]
        expected = sum((row[6] - row[5]) * self._by_name[row[0]].element_size() for row in trainable)
        if expected != num_bytes:
            raise ProtocolError(f"worker {worker} sends {num_bytes} bytes for what joins, expected {expected}")
        for settings, _ in joining.groups:
            check_group(worker, settings, served.optimizer)
        return joining

    def _find(self, worker: int, row: list[Any], among: set[Tensor]) -> tuple[str, Piece]:
        name, shape, stride, dtype, trainable, start, end = row
        parameter = self._by_name.get(name)
        if parameter is None or parameter not in among:
            raise ProtocolError(f"worker {worker} lets {name!r} join, which the server's optimizer cannot take in")
        own = [list(parameter.shape), list(parameter.stride()), str(parameter.dtype)]
        if own != [shape, stride, dtype]:
            raise ProtocolError(f"worker {worker} lets {name!r} join as {[shape, stride, dtype]}, the server has {own}")
        cut = Cut(0, start, end)
        fits = 0 <= start <= end <= parameter.numel()
        if not fits or not (cut.is_whole(parameter) or (is_dense(parameter) and trainable and start < end)):
            raise ProtocolError(f"worker {worker} lets elements {start} to {end} of {name!r} join: no such")
        return name, Piece(parameter, cut)

    def grow(
        self, number: int, request: dict[str, Any], joining: Joining, payload: Any, memory: SharedBuffers | None
    ) -> None:
        """Take it in. ``memory`` is for the new values, None if they go into memory of this process."""
        served = self._served[number]
        pairs = list(zip(_rows(request), joining.named, strict=True))
        new = [tensor for row, (_, tensor) in pairs if row[4]]
        memory = memory if new else None
        try:
            for row, (_, tensor) in pairs:
                tensor.requires_grad_(row[4])
            groups = [_new_group(served.optimizer, *group) for group in joining.groups]
            buckets = served.grow(new, groups, memory.allocate if memory else None)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ProtocolError(f"the server's optimizer cannot take in a parameter group: {error}") from error
        start = 0
        with torch.no_grad():
            for bucket in buckets:
                end = start + bucket.num_bytes
                # copied, since a slice need not lie where its type wants it
                bucket.buffer().copy_(tensor_from(bytearray(payload[start:end]), bucket.buffer().dtype))
                start = end
        self._requests[number].append(request)
        self._memory[number].append(memory)

    def attach(self, worker: int, number: int) -> tuple[int, Any]:
        """``worker`` knows of one more growth from now on: where its buckets begin, and the memory of the values."""
        served, taken = self._served[number], self._num_taken.get((worker, number), 0)
        first = served.know(worker, taken + 1)
        self._num_taken[worker, number] = taken + 1
        memory = self._memory[number][taken]
        return first, memory.handle() if memory else None

    def seal(self) -> None:
        """Nobody attaches to the memory of what has joined from now on."""
        for memory in (m for own in self._memory for m in own if m):
            memory.seal()


def check_group(worker: int, settings: dict[str, Any], optimizer: Optimizer) -> None:
    """Raises ProtocolError unless ``optimizer`` can have a parameter group with ``settings``."""
    check_settings(worker, [settings], [optimizer.defaults])


def _rows(request: dict[str, Any]) -> list[list[Any]]:
    return [*request["unfrozen"], *(row for group in request["groups"] for row in group["rows"])]


def _new_group(optimizer: Optimizer, settings: dict[str, Any], rows: list[tuple[str, Piece]]) -> dict[str, Any]:
    group = {**settings, **optimizer.defaults}
    update_group(group, settings)
    pairs: list[Any] = [(name, piece.tensor) for name, piece in rows]
    named = any("param_names" in other for other in optimizer.param_groups)
    return {**group, "params": pairs if named else [tensor for _, tensor in pairs]}
