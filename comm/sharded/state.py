"""Optimizer state between its two forms: pieces on every rank, and the whole as one process alone would have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..agreement import gather_trees
from ..buckets import view_like
from ..optimizers import PER_PARAMETER, is_elementwise
from .shard import Piece


def gather_state(inner: Optimizer, pieces: Sequence[Piece], parameters: Sequence[Tensor]) -> dict[int, Any]:
    """On rank 0 the ``state`` of an ordinary state dict; empty on the others. Blocks; called on all ranks.

    Args:
        inner: Has the state of ``pieces``.
        pieces: This rank's.
        parameters: Of all groups in order, whose positions are the keys.

    Raises:
        TypeError: the state holds something else than tensors, scalars, strings and containers of them.
    """
    position = {p: i for i, p in enumerate(parameters)}
    mine = [
        [position[piece.parameter], piece.start, inner.state[piece.values]]
        for piece in pieces
        if piece.values in inner.state
    ]
    rows = sorted((row for tree in gather_trees(mine) for row in tree), key=lambda row: row[:2])
    parts: dict[int, list[dict[str, Any]]] = {}
    for index, _, state in rows:
        parts.setdefault(index, []).append(state)
    if not is_elementwise(inner):
        return {index: _laid_out(states[0], parameters[index]) for index, states in parts.items()}
    return {index: _join(states, parameters[index]) for index, states in parts.items()}


def _join(states: list[dict[str, Any]], parameter: Tensor) -> dict[str, Any]:
    joined = dict(states[0])
    for key, value in joined.items():
        if _is_cut(key, value):
            joined[key] = view_like(torch.cat([state[key].view(-1) for state in states]), parameter.detach())
    return joined


def _laid_out(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Travelling made tensors contiguous: those of the parameter's shape get its strides again."""
    return {
        key: view_like(value.new_empty(value.numel()), parameter.detach()).copy_(value)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def _is_cut(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in PER_PARAMETER


def cut_state(
    inner: Optimizer, groups: Sequence[Sequence[Piece]], parameters: Sequence[Sequence[Tensor]], full: dict[str, Any]
) -> dict[str, Any]:
    """The part of the ordinary state dict ``full`` that ``inner`` may load while its parameters are pieces.

    Args:
        inner: Of the type that ``full`` is of.
        groups: This rank's pieces per parameter group.
        parameters: All parameters per group, as ``full`` has them.
        full: Not changed.

    Raises:
        ValueError: it belongs to other parameters.
    """
    saved_groups = full["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group) for group in parameters]:
        raise ValueError("the optimizer state belongs to parameter groups of other sizes")
    key_of = {
        p: key
        for group, saved in zip(parameters, saved_groups, strict=True)
        for p, key in zip(group, saved["params"], strict=True)
    }
    state: dict[int, Any] = {}
    cut_groups: list[dict[str, Any]] = []
    number = 0
    for pieces, saved in zip(groups, saved_groups, strict=True):
        numbers = range(number, number + len(pieces))
        cut_groups.append({**saved, "params": list(numbers)})
        for number, piece in zip(numbers, pieces, strict=True):
            if (whole := full["state"].get(key_of[piece.parameter])) is not None:
                state[number] = _cut(whole, piece) if is_elementwise(inner) else whole
        number = numbers.stop
    return {"state": state, "param_groups": cut_groups}


def _cut(state: dict[str, Any], piece: Piece) -> dict[str, Any]:
    end = piece.start + piece.values.numel()
    return {
        key: _in_memory_order(value, piece.parameter)[piece.start : end].clone() if _is_cut(key, value) else value
        for key, value in state.items()
    }


def _in_memory_order(value: Tensor, parameter: Tensor) -> Tensor:
    """1-D, in the order in which the parameter's elements lie in memory."""
    flat = value.new_empty(parameter.numel())
    view_like(flat, parameter.detach()).copy_(value.view(parameter.shape))
    return flat
