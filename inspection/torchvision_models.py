"""torchvision's networks by name, with the weights that training would begin with: random ones."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn
from torchvision import models

from ..errors import UserError
from .building import build
from .entries import Listing, list_module


def names() -> list[str]:
    return models.list_models()


def knows(name: str) -> bool:
    return name in names()


def load(name: str, with_values: bool) -> Listing:
    """Nothing is downloaded. Raises: UserError, for an unknown name."""
    if not knows(name):
        nearest = ", ".join(difflib.get_close_matches(name.lower(), names(), n=5, cutoff=0.5))
        raise UserError(f"torchvision has no model {name!r}; nearest: {nearest or 'none'}")
    options = _options(name)
    module: nn.Module = build(lambda: models.get_model(name, **options), with_values)
    return list_module(f"{name} of torchvision", module, {"torchvision": name, **options})


def _options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # the default is downloaded
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # or they warn that this default will change
    return options
