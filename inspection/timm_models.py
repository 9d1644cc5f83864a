"""timm's networks by name, with random weights."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from ..errors import UserError
from .building import build
from .entries import Listing, list_module
from .optional import is_installed, optional


def names() -> list[str]:
    """None without timm."""
    return optional("timm", "").list_models() if is_installed("timm") else []


def knows(name: str) -> bool:
    return is_installed("timm") and bool(optional("timm", "").is_model(name))


def load(name: str, with_values: bool) -> Listing:
    """Nothing is downloaded. Raises: UserError, for an unknown name or without timm."""
    timm: Any = optional("timm", f"timm:{name}")
    if not knows(name):
        nearest = ", ".join(difflib.get_close_matches(name.lower(), names(), n=5, cutoff=0.5))
        raise UserError(f"timm has no model {name!r}; nearest: {nearest or 'none'}")
    module: nn.Module = build(lambda: timm.create_model(name, pretrained=False), with_values)
    config = getattr(module, "pretrained_cfg", None) or {}
    return list_module(f"{name} of timm", module, {"timm": name, "pretrained": False, "pretrained_cfg": dict(config)})
