"""One record per parameter, of a module or of a file; what is unusual about some of them, in a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .sizes import size

_MOST_NAMES = 3


@final
@dataclass(frozen=True)
class Entry:
    """A parameter of a module, or a tensor of a file.

    Attributes:
        shape: None for one whose size the first batch decides (``nn.LazyLinear``).
        num_bytes: Of its values; of a sparse one those that are stored, with their indices.
        trainable: None where only a file is known, which does not say.
        tied: Other names of the same tensor.
        load: Gives its values; None where there are none (meta device).
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    count: int
    num_bytes: int
    trainable: bool | None
    tied: tuple[str, ...] = ()
    is_sparse: bool = False
    load: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)


@final
@dataclass(frozen=True)
class Listing:
    """All that is known of a model.

    Attributes:
        title: What it is, for the first line.
        built_with: Plain data: what ``--config`` shows.
        notes: Lines about what is unusual.
        module: None where only a file is known.
    """

    title: str
    entries: list[Entry]
    built_with: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    module: nn.Module | None = None


def entry_of(
    name: str,
    tensor: Tensor,
    trainable: bool | None,
    tied: Iterable[str] = (),
    load: Callable[[], Tensor] | None = None,
) -> Entry:
    """The record of ``tensor``, whose values are not touched."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return Entry(name, None, tensor.dtype, 0, 0, trainable, tuple(tied))
    is_sparse = tensor.layout != torch.strided
    num_bytes = _stored_bytes(tensor) if is_sparse else tensor.numel() * tensor.element_size()
    shape = tuple(tensor.shape)
    return Entry(name, shape, tensor.dtype, tensor.numel(), num_bytes, trainable, tuple(tied), is_sparse, load)


def _stored_bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return sum(part.numel() * part.element_size() for part in parts)


def module_entries(module: nn.Module) -> list[Entry]:
    """The parameters of ``module`` in its order; a tensor that has several names counts once, under its first."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [
        entry_of(own[0], p, p.requires_grad, own[1:], None if p.is_meta else (lambda p=p: p.detach()))
        for p, own in names.items()
    ]


def module_notes(module: nn.Module) -> list[str]:
    """Lines about tensors that are not simply parameters."""
    parameters = dict(module.named_parameters())
    notes = tied_notes(module_entries(module))
    if sparse := [name for name, p in parameters.items() if p.layout != torch.strided]:
        notes.append(f"sparse: {_some(sparse)}: counted with zeros, sized by what is stored; no strategy can send it")
    if lazy := [name for name, p in parameters.items() if isinstance(p, UninitializedParameter)]:
        notes.append(f"without a shape before the first batch: {_some(lazy)}; not counted")
    gradients = [name for name, m in module.named_modules() if getattr(m, "sparse", False) is True]
    if gradients:
        notes.append(f"sparse gradients: {_some(gradients)}; our strategies send dense ones only (sparse=False)")
    if buffers := [(n, b) for n, b in module.named_buffers() if not isinstance(b, UninitializedBuffer)]:
        num_bytes = sum(buffer.numel() * buffer.element_size() for _, buffer in buffers)
        notes.append(
            f"buffers: {len(buffers)}, {size(num_bytes)} ({_some([name for name, _ in buffers])}); "
            "no parameters, not counted above"
        )
    return notes


def tied_notes(entries: Iterable[Entry]) -> list[str]:
    return [f"tied: {e.name} is also {', '.join(e.tied)}; one tensor, counted once" for e in entries if e.tied]


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def list_module(title: str, module: nn.Module, built_with: dict[str, Any]) -> Listing:
    return Listing(title, module_entries(module), built_with, module_notes(module), module)
