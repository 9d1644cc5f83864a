"""The control plane of async workers: through the store in the server's process, without any process group."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ..comm.packing import pack_tree, unpack_tree
from ..errors import StoppedBySignal, UserError
from .control_plane import ControlPlane

_CHUNK_BYTES = 4 * 1024 * 1024
"""Torch's store refuses values above 8 MiB."""

_LOST = b"lost"
"""In the place of a rank's data: it did not come."""

_LONGEST_PAUSE_S = 0.05
"""How often a rank that waits looks whether the others get on."""


def _mean(stacked: Tensor) -> Tensor:
    return stacked.mean(0, dtype=None if stacked.is_floating_point() else torch.get_default_dtype())


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _mean,
    "avg": _mean,
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}


@final
class StoreControlPlane(ControlPlane):
    """Every operation is a gathering at which all ranks leave their data in ``store``. Nothing is ever unpickled.

    A default process group would not do: Lightning broadcasts a flag on it before every batch, so that all workers
    would go at the pace of the slowest.

    Args:
        store: Of this run; every rank makes the same calls in the same order.
        rank: This one's.
        world_size: How many ranks take part.
        timeout_s: How long a rank waits for others while ``progress`` stands still.
        progress: What changes as long as the others train.
        lost: Ranks that do not take part any more.
        stopped: The signal for which ranks stop, each after its own step; None as long as there is none.

    Raises:
        UserError: (every operation) naming the ranks that did not come.
        StoppedBySignal: (every operation) they do not come because they have stopped.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        progress: Callable[[], Any],
        stopped: Callable[[], int | None],
        lost: Callable[[], Container[int]] = tuple,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._progress = progress
        self._stopped = stopped
        self._lost = lost
        self._gone: set[int] = set()
        """Lost ranks that all the others know did not come to a gathering."""
        self.number = 0
        """Of the next gathering."""
        self._mine: list[list[str]] = []

    # -- gathering -------------------------------------------------------------------------------------------

    @override
    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Without those of lost ranks."""
        return list(self._gather_bytes(data).values())

    def _gather_bytes(self, data: bytes) -> dict[int, bytes]:
        """By rank."""
        number, self.number = self.number, self.number + 1
        self._forget()
        chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
        keys = [f"gathering {number} {self._rank} {index}" for index in range(len(chunks))]
        for key, chunk in zip(keys, chunks, strict=True):
            self._store.set(key, chunk)  # pyright: ignore[reportArgumentType] (torch's stubs know str only)
        head = f"gathering {number} {self._rank}"
        if self._store.compare_set(head, "", str(len(chunks))) == _LOST:  # last: who sees it finds the chunks
            raise UserError(f"the others have gone on without rank {self._rank}, which they took for lost")
        self._mine.append([head, *keys])
        read = {r: data if r == self._rank else self._read(number, r) for r in self._expected()}
        return {rank: value for rank, value in read.items() if value is not None}

    def count_in(self, rank: int) -> None:
        """A process in the place of a lost one takes part from the next gathering on; called on all ranks."""
        self._gone.discard(rank)

    def begin_at(self, number: int, without: Iterable[int]) -> None:
        """This process takes part from gathering ``number`` on."""
        self.number = number
        self._gone = set(without)

    def check_stopped(self) -> None:
        """Raises StoppedBySignal if ranks stop for a signal."""
        if (signum := self._stopped()) is not None:
            raise StoppedBySignal(signum, None)

    def _expected(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in self._gone]

    def _forget(self) -> None:
        """Everybody has read what this rank left two gatherings ago: they have all come to the one after it."""
        if len(self._mine) > 1:
            for key in self._mine.pop(0):
                self._store.delete_key(key)

    def _read(self, number: int, rank: int) -> bytes | None:
        """What ``rank`` has left; None if it was lost before."""
        head = f"gathering {number} {rank}"
        self._wait_for(head, rank)
        if (found := self._store.get(head)) == _LOST:
            self._gone.add(rank)
            return None
        num_chunks = int(found)
        return b"".join(self._store.get(f"{head} {index}") for index in range(num_chunks))

    def _wait_for(self, key: str, rank: int) -> None:
        progress, deadline, pause_s = None, 0.0, 0.001
        while not self._store.check([key]):
            self.check_stopped()  # who has stopped does not come any more
            if rank in self._lost():
                self._store.compare_set(key, "", _LOST.decode())  # one word for all: it has come, or it has not
                return
            if (now := self._progress()) != progress:
                progress, deadline = now, time.monotonic() + self._timeout_s
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank} did not take part within {self._timeout_s:g} s; "
                    "--trainer.strategy.step_timeout_s raises the limit"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _gather(self, tree: Any) -> dict[int, Any]:
        """Every rank's ``tree`` of tensors, numbers, strings and containers of them."""
        description, payload = pack_tree(tree)
        text = json.dumps(description).encode()
        gathered = {}
        for rank, data in self._gather_bytes(len(text).to_bytes(8, "little") + text + payload).items():
            end = 8 + int.from_bytes(data[:8], "little")
            gathered[rank] = unpack_tree(json.loads(data[8:end]), bytearray(data[end:]))
        return gathered

    # -- what Lightning asks for -----------------------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None) -> None:
        self.all_gather_bytes(b"")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._gather(obj if self._rank == src else None)[src]

    @override
    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        mine = list(tensors)
        shared = self._gather([t.detach() for t in mine] if self._rank == src else None)[src]
        if self._rank != src:
            with torch.no_grad():
                for tensor, value in zip(mine, shared, strict=True):
                    tensor.copy_(value)

    @override
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        name = str(getattr(reduce_op, "name", reduce_op)).lower()
        if name not in _REDUCTIONS:
            raise UserError(f"reducing by {name} is not possible under --trainer.strategy.mode async or bounded")
        return _REDUCTIONS[name](self.all_gather(tensor))

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return torch.stack(self.gather_tensors(tensor))

    def gather_tensors(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """Every rank's tensor, whatever their shapes: torchmetrics' ``dist_sync_fn``."""
        return [value.to(tensor.device) for value in self._gather(tensor.detach()).values()]
