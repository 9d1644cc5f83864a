"""What a training loop takes for its optimizer: it steps this rank's pieces and exchanges the new values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from typing_extensions import override

from ..optimizers import steps_per_tensor
from .layout import Unshardable
from .shard import Piece, Shard
from .state import cut_state, gather_state
from .transport import Transport


@final
class ShardedOptimizer(Optimizer):
    """Shares the parameter groups with ``inner``, so schedulers and settings work; they hold the whole parameters.

    Only while ``inner`` steps do its groups hold this rank's pieces: its state, and its time, are those of a shard.
    :meth:`step`, :meth:`clip`, and :meth:`state_dict` are called on all ranks in the same order, and block.

    Args:
        inner: The optimizer as configured.
        shards: Its buckets, in order.
        transport: How new values reach the others.
        group: For clipping by norm; gloo, and nothing else travels on it then.
    """

    def __init__(
        self, inner: Optimizer, shards: Sequence[Shard], transport: Transport, group: dist.ProcessGroup
    ) -> None:
        super().__init__(inner.param_groups, dict(inner.defaults))
        self._inner = inner
        self._shards = list(shards)
        self._transport: Transport | None = transport
        self._group = group
        self._whole = [list(g["params"]) for g in inner.param_groups]
        self._group_of = {p: number for number, group in enumerate(self._whole) for p in group}
        self._ready = True
        if inner.state:  # some have it from the start: Adagrad
            full = inner.state_dict()
            inner.state.clear()
            self.load_state_dict(full)

    # -- a step ----------------------------------------------------------------------------------------------

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step the own pieces; blocks until every rank's new values are here.

        Raises:
            Unshardable: a parameter group was added in mid-run.
            PeerLost: a peer has ended or does not come.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        self._step()
        # Schedulers watch the optimizer they were made for and warn if it was never stepped.
        self._inner._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        assert self._transport is not None, "the run is over"
        for shard in self._shards:
            shard.move_in()
        self._transport.begin_step()
        alone = steps_per_tensor(self._inner)
        for shards in [[shard] for shard in self._shards] if alone else [self._shards]:
            self._step_pieces(shards, even_without=not alone)
            for shard in shards:  # just stepped, so still in the cache
                self._transport.publish(shard.index)
        self._transport.end_step()
        # as any optimizer that works in place: a backward pass through older values is an error then
        torch.autograd.graph.increment_version([p for shard in self._shards for p in shard.parameters])

    def _step_pieces(self, shards: Sequence[Shard], even_without: bool) -> None:
        """``even_without``: also where this rank has no piece to step, since some count their steps per call."""
        used = [piece for shard in shards for piece in shard.settle()]
        for piece in used:
            piece.values.grad = piece.gradient
        if used or (even_without and any(p.grad is not None for shard in shards for p in shard.parameters)):
            with self._stepping(shards):
                self._inner.step()
        for piece in used:
            piece.values.grad = None

    @contextmanager
    def _stepping(self, shards: Sequence[Shard]) -> Iterator[None]:
        """The pieces of ``shards`` are the parameters of ``inner``."""
        for group, pieces in zip(self._inner.param_groups, self._by_group(shards), strict=True):
            group["params"] = [piece.values for piece in pieces]
        try:
            yield
        finally:
            for group, parameters in zip(self._inner.param_groups, self._whole, strict=True):
                group["params"] = parameters

    def _by_group(self, shards: Sequence[Shard]) -> list[list[Piece]]:
        groups: list[list[Piece]] = [[] for _ in self._whole]
        for shard in shards:
            for piece in shard.pieces:
                groups[self._group_of[piece.parameter]].append(piece)
        return groups

    def clip(self, algorithm: str, value: float) -> None:
        """Clip the average before the coming step: by ``"value"``, or by the ``"norm"`` over all ranks' pieces."""
        gradients = [piece.gradient for shard in self._shards for piece in shard.settle()]
        if algorithm == "value":
            for gradient in gradients:
                gradient.clamp_(-value, value)
            return
        square = torch.nn.utils.get_total_norm(gradients).double().square().cpu().reshape(1)
        dist.all_reduce(square, group=self._group)
        factor = value / (math.sqrt(square.item()) + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients if not factor >= 1.0 else ():
            gradient.mul_(factor)

    # -- state -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """On rank 0 what ``inner`` alone would have; the others get no state. Works after the run, too."""
        full = super().state_dict()  # of the groups: this object has no state
        pieces = [piece for shard in self._shards for piece in shard.pieces]
        full["state"] = gather_state(self._inner, pieces, [p for group in self._whole for p in group])
        return full

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of an ordinary state dict, which every rank passes; does not communicate.

        Raises:
            ValueError: it belongs to other parameters.
        """
        part = cut_state(self._inner, self._by_group(self._shards), self._whole, state_dict)
        with self._stepping(self._shards):
            self._inner.load_state_dict(part)
        self.param_groups = self._inner.param_groups  # the optimizer has made new ones

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_ready", False):
            self._refuse_new_groups()
        super().add_param_group(param_group)

    def _check_groups(self) -> None:
        if len(self._inner.param_groups) != len(self._whole):
            self._refuse_new_groups()

    def _refuse_new_groups(self) -> None:
        raise Unshardable(
            "--trainer.strategy sharded_server cannot take a new parameter group in mid-run (BackboneFinetuning adds "
            "one): pass all parameters to the optimizer from the start, or use --trainer.strategy manual_allreduce"
        )

    def close(self) -> None:
        """Let go of the memory of the run; the state stays."""
        for shard in self._shards:
            shard.release()
        self._transport = None
