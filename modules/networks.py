"""torchvision's classification networks by name, with random weights."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn
from torchvision import models

from ..errors import UserError

# Those in whose blocks `zero_init_residual` starts each residual branch at zero.
_RESNETS = ("resnet", "resnext", "wide_resnet")
# Their second outputs are for training only, and the default initialization warns.
_WITH_SECOND_OUTPUT = ("googlenet", "inception_v3")


def build_network(arch: str, num_classes: int, zero_init_residual: bool, rescale_input: bool = False) -> nn.Module:
    """Network from images (N, 3, H, W) to logits (N, num_classes).

    ``rescale_input`` is for the published weights of GoogLeNet and Inception, which want another normalization.

    Raises:
        UserError: torchvision has no classification network of this name.
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    if arch.startswith(_RESNETS):
        kwargs["zero_init_residual"] = zero_init_residual
    if arch in _WITH_SECOND_OUTPUT:
        kwargs |= {"aux_logits": False, "init_weights": True, "transform_input": rescale_input}
    return models.get_model(check_arch(arch), weights=None, **kwargs)


def check_arch(arch: str) -> str:
    """Return the name, or raise a ``UserError`` that lists the nearest ones."""
    known = models.list_models(module=models)
    if arch in known:
        return arch
    nearest = difflib.get_close_matches(arch.lower(), known, n=5, cutoff=0.5)
    hint = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(known)}"
    raise UserError(f"--model.arch must be a classification network of torchvision, got {arch!r}; {hint}")
