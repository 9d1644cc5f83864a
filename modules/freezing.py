"""Parts of a network that are not trained."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .patterns import lies_below, parts_named


def freeze(net: nn.Module, patterns: str) -> list[str]:
    """Let the parameters of parts ask for no gradient, see :func:`.patterns.parts_named`.

    Returns:
        Names of the BatchNorm layers in these parts, for whom to keep the statistics that they have.

    Raises:
        UserError: there is no such part, or nothing is left to be trained.
    """
    parts = set(parts_named(net, patterns, "--model.freeze"))
    for name, parameter in net.named_parameters():
        if name in parts or lies_below(name, parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserError(f"--model.freeze {patterns}: leaves nothing to be trained")
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, _BatchNorm)
        and (name in parts or lies_below(name, parts) or (module.affine and is_frozen(module)))
    ]


def is_frozen(module: nn.Module) -> bool:
    """Whether none of its parameters is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())
