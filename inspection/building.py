"""Make a module without memory for its parameters, where it can be made so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ..comm.shared_memory.room import available_bytes
from ..errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def build(make: Callable[[], Module], with_values: bool) -> Module:
    """What ``make`` makes, on the meta device; on the CPU if values are wanted, or if it cannot be made on meta.

    Raises:
        UserError: values are wanted, and there is no memory for them.
    """
    try:
        made = _on_meta(make)
    except Exception:  # a constructor may look at values (``.item()``), and fails in its own way
        return make()
    if not with_values:
        return made
    needed = sum(p.numel() * p.element_size() for p in made.parameters() if not _is_lazy(p))
    if needed > (available := available_bytes()):
        raise UserError(
            f"--values needs the model's first values, {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of "
            "memory are available: name a file by --checkpoint, which is read tensor by tensor"
        )
    return make()


def _on_meta(make: Callable[[], Module]) -> Module:
    with warnings.catch_warnings(), torch.device("meta"):
        # Weights that are loaded into it go nowhere, as is meant.
        warnings.filterwarnings("ignore", message=r"for .*: copying from a non-meta parameter")
        return make()


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)
