"""A bucket as one rank sees it: the parameters live in its memory, and this rank steps a slice of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..buckets import Bucket, apart, split, view_like
from .layout import ShardPlan


@dataclass(eq=False)
class Piece:
    """The part of a parameter that this rank steps."""

    parameter: Tensor
    start: int
    """Its first element, in the order of the parameter's memory."""
    values: Tensor
    """What the optimizer steps, a leaf: 1-D, or the whole parameter in its own shape."""
    gradient: Tensor
    """Of the same shape, in the bucket."""


@final
class Shard:
    """See the module. Nothing here communicates.

    Args:
        plan: What is in the bucket.
        bucket: Its gradients.
        values: Memory for its parameters, of the plan's ``spec``; they move in by :meth:`move_in`.
        rank: Whose slice.
        whole: Pieces keep the parameter's shape, which the optimizer needs; slices are whole parameters then.
    """

    def __init__(self, plan: ShardPlan, bucket: Bucket, values: Tensor, rank: int, whole: bool) -> None:
        self.index = bucket.index()
        self.parameters = plan.parameters
        self.pieces: list[Piece] = []
        self._slice = plan.slices[rank]
        self._gradients = bucket.slices
        self._views = bucket.views
        self._factor = len(plan.slices)
        self._reopened: set[int] = set()
        homes = [apart(home) for home in split(values, plan.parameters, aligned=True)]
        self._homes = [view_like(home, p) for home, p in zip(homes, plan.parameters, strict=True)]
        for number, (parameter, home) in enumerate(zip(plan.parameters, homes, strict=True)):
            start, end = self._own_part(number)
            if start < end:
                gradient, own = bucket.slices[number][start:end], home[start:end]
                if whole:
                    gradient, own = bucket.views[number], self._homes[number]
                self.pieces.append(Piece(parameter, start, own.detach().requires_grad_(), gradient))

    def _own_part(self, number: int) -> tuple[int, int]:
        """This rank's elements of parameter ``number``."""
        flat = self._gradients[number]
        offset = int(flat.storage_offset()) - int(self._gradients[0].storage_offset())
        first, last = (min(max(bound - offset, 0), flat.numel()) for bound in self._slice)
        return first, last

    @torch.no_grad()
    def move_in(self) -> None:
        """Let the parameters live in ``values``, also those that someone has given other memory since."""
        for parameter, home in zip(self.parameters, self._homes, strict=True):
            if parameter.data_ptr() != home.data_ptr():
                home.copy_(parameter)
                parameter.data = home

    # -- gradients -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reopen(self) -> None:
        """Before a backward pass: let it add to averages that are still there, as it does under DDP.

        Only this rank's slice is an average. Counted once per rank here and not at all elsewhere, it is part of the
        next sum as if all ranks had it.
        """
        for number, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            if parameter.grad is not view:
                self._reopened.discard(number)
            elif number not in self._reopened:
                start, end = self._own_part(number)
                flat = self._gradients[number]
                flat[start:end].mul_(self._factor)
                flat[:start].zero_()
                flat[end:].zero_()
                self._reopened.add(number)

    def averaged(self) -> None:
        """A backward pass has made all gradients averages again."""
        self._reopened = {number for number in self._reopened if not self.parameters[number].requires_grad}

    @torch.no_grad()
    def settle(self) -> list[Piece]:
        """Pieces of parameters that have a gradient; it is in the bucket then, whoever set it."""
        used: set[Tensor] = set()
        for number, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            if parameter.grad is None:
                continue
            used.add(parameter)
            if parameter.grad is not view:
                parameter.grad = view.copy_(parameter.grad)
            elif number in self._reopened:
                view.div_(self._factor)
                self._reopened.discard(number)
        return [piece for piece in self.pieces if piece.parameter in used]

    # -- the end ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def release(self) -> None:
        """Give the parameters memory of their own again and let go of the bucket; optimizer state stays."""
        for parameter, home, view in zip(self.parameters, self._homes, self._views, strict=True):
            if parameter.data_ptr() == home.data_ptr():
                parameter.data = home.clone()
            if parameter.grad is view:
                parameter.grad = None
        for piece in self.pieces:
            piece.values.grad = None
            piece.values.data = piece.gradient = piece.values.new_empty(0)
        self._homes, self._views, self._gradients = [], [], []
