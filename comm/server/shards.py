"""Which server serves what: whole parameters spread evenly, and pieces of those that are too large for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..buckets import is_dense, view_like
from ..optimizers import PER_PARAMETER
from .layout import flat_alias

_CUT_ELEMENTS = 64
"""Pieces begin at multiples of this, so that an optimizer's vector instructions see the same lanes as in the whole."""


@final
@dataclass(frozen=True)
class Cut:
    """Elements ``[start, end)``, in memory order, of the parameter at ``index``."""

    index: int
    start: int
    end: int

    def is_whole(self, parameter: Tensor) -> bool:
        return self.end - self.start == parameter.numel()

    def name(self, name: str, parameter: Tensor) -> str:
        return name if self.is_whole(parameter) else f"{name}[{self.start}:{self.end}]"

    def of(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """These elements of ``tensor``, which has the parameter's shape; without a copy where strides allow it."""
        flat = flat_alias(tensor, parameter)
        if flat is None:
            flat = tensor.new_empty(tensor.numel())
            view_like(flat, parameter.detach()).copy_(tensor)
        return flat[self.start : self.end]


def spread(parameters: Sequence[Tensor], num_servers: int, may_cut: bool) -> list[list[Cut]]:
    """Per server what it serves, in the order of the parameters; the same wherever it is computed.

    Args:
        may_cut: Whether a tensor above an even share may be cut: only an elementwise optimizer does not notice.
    """
    share = sum(p.nbytes for p in parameters if p.requires_grad) / num_servers
    cuts = [cut for index, p in enumerate(parameters) for cut in _cuts(index, p, share if may_cut else math.inf)]
    loads, served = [0] * num_servers, [[] for _ in range(num_servers)]
    for cut in sorted(cuts, key=lambda cut: cut.start - cut.end):  # the largest first; sorting is stable
        parameter = parameters[cut.index]
        server = loads.index(min(loads)) if parameter.requires_grad else 0
        loads[server] += (cut.end - cut.start) * parameter.element_size() if parameter.requires_grad else 0
        served[server].append(cut)
    return [sorted(own, key=lambda cut: (cut.index, cut.start)) for own in served]


def _cuts(index: int, parameter: Tensor, share: float) -> list[Cut]:
    numel = parameter.numel()
    if not parameter.requires_grad or not is_dense(parameter) or parameter.nbytes <= share:
        return [Cut(index, 0, numel)]
    num_pieces = math.ceil(parameter.nbytes / share)
    step = math.ceil(numel / num_pieces / _CUT_ELEMENTS) * _CUT_ELEMENTS
    return [Cut(index, start, min(start + step, numel)) for start in range(0, numel, step)]


@final
class Piece:
    """A cut as a leaf tensor that shares the parameter's memory; whole parameters stand for themselves."""

    def __init__(self, parameter: Tensor, cut: Cut) -> None:
        self.parameter, self.cut = parameter, cut
        self.is_whole = cut.is_whole(parameter)
        self.tensor = parameter if self.is_whole else nn.Parameter(cut.of(parameter.detach(), parameter))

    def follow(self) -> None:
        """Take the parameter's present memory and gradient."""
        if not self.is_whole:
            self.tensor.data = self.cut.of(self.parameter.detach(), self.parameter)
            gradient = self.parameter.grad
            self.tensor.grad = None if gradient is None else self.cut.of(gradient, self.parameter)


def join_states(
    states: Sequence[dict[int, dict[str, Any]]], cuts: Sequence[Sequence[Cut]], parameters: Sequence[Tensor]
) -> dict[int, dict[str, Any]]:
    """The ``state`` of an ordinary state dict from those of the servers, whose keys are positions in ``cuts``."""
    rows = [(own[key], values) for state, own in zip(states, cuts, strict=True) for key, values in state.items()]
    parts: dict[int, list[dict[str, Any]]] = {}
    for cut, values in sorted(rows, key=lambda row: (row[0].index, row[0].start)):
        parts.setdefault(cut.index, []).append(values)
    return {index: _join(part, parameters[index]) for index, part in parts.items()}


def _join(states: list[dict[str, Any]], parameter: Tensor) -> dict[str, Any]:
    if len(states) == 1:
        return states[0]
    joined = dict(states[0])
    for key, value in joined.items():
        if isinstance(value, Tensor) and key not in PER_PARAMETER:
            joined[key] = view_like(torch.cat([state[key] for state in states]), parameter.detach())
    return joined


def cut_state(full: dict[int, Any], own: Sequence[Cut], parameters: Sequence[Tensor]) -> dict[int, Any]:
    """Inverse of :func:`join_states` for one server."""
    return {
        key: {name: _cut(name, value, cut, parameters[cut.index]) for name, value in full[cut.index].items()}
        for key, cut in enumerate(own)
        if cut.index in full
    }


def _cut(name: str, value: Any, cut: Cut, parameter: Tensor) -> Any:
    if cut.is_whole(parameter) or not isinstance(value, Tensor) or name in PER_PARAMETER:
        return value
    return cut.of(value, parameter).clone()
