"""Parts of a network that keep their input instead of all activations, and compute these again in the backward pass.

Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174, by ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .patterns import lies_below, parts_named

_FLAG = "--model.gradient_checkpointing"
# By block ResNet-50 keeps a third of its activations, by stage (`layer[1234]`) half, for the same computing.
_BLOCKS_OF_RESNETS = "layer[1234].*"


def checkpoint_activations(net: nn.Module, parts: str | bool) -> None:
    """Let parts of a network compute their activations twice, with the same gradients and BatchNorm statistics.

    Args:
        net: The ``forward`` of its parts is replaced.
        parts: Patterns of modules, see :func:`.patterns.parts_named`; of a ``ModuleList`` its members. True: the blocks
            of a ResNet. False: none.

    Raises:
        UserError: there is no such module, or True for another network.
    """
    if parts is False:
        return
    for module in _modules(net, _blocks(net) if parts is True else parts):
        module.forward = _Checkpointed(module, module.forward)


def _blocks(net: nn.Module) -> str:
    if hasattr(net, "layer1"):
        return _BLOCKS_OF_RESNETS
    lists = {name for name, part in net.named_modules() if name and isinstance(part, nn.Sequential | nn.ModuleList)}
    names = ",".join(f"{name}.*" for name in sorted(lists) if not lies_below(name, lists))
    raise UserError(f"{_FLAG} true is for ResNets; name the parts of this network, such as {names}")


def _modules(net: nn.Module, patterns: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name in parts_named(net, patterns, _FLAG):
        if any(name == parameter for parameter, _ in net.named_parameters()):
            raise UserError(f"{_FLAG}: {name} is a parameter; name modules")
        module = net.get_submodule(name)
        found += module if isinstance(module, nn.ModuleList) else [module]
    return found


@final
class _Checkpointed:
    """In the place of a module's ``forward``. No closure, so that copies of the module call their own."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For the first pass and for the second."""
        return nullcontext(), _same_statistics(self._module)


@contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers count no batch within: the second pass would count it once more."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
