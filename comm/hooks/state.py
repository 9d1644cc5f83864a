"""What our engine must know of a hook's state: the bytes it sends, and what a checkpoint has to hold."""

from __future__ import annotations

import inspect
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from ..algorithms.algorithm import ring_bytes
from ..buckets import Bucket

_POWERSGD_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")
_HALF = {default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook}
_WRAPPERS = {"fp16_compress_wrapper_hook", "bf16_compress_wrapper_hook"}


def unwrapped(hook: Any) -> Any:
    """The hook inside torch's ``fp16_compress_wrapper`` and ``bf16_compress_wrapper``."""
    while getattr(hook, "__name__", "") in _WRAPPERS:
        hook = inspect.getclosurevars(hook).nonlocals["hook"]
    return hook


@final
class HookState:
    """A hook's state as it was given, with what torch's own states do not offer.

    A state of a user's own takes part with the methods ``num_bytes(bucket)``, ``state_dict()`` and
    ``load_state_dict(dict)``, each on its own.
    """

    def __init__(self, hook: Any, given: Any) -> None:
        self.given = given
        inner = unwrapped(hook)
        self._is_half = inner in _HALF or inner is not hook
        self._numel_before = 0
        is_stateless = given is None or isinstance(given, dist.ProcessGroup)
        self.is_saved = is_stateless or isinstance(given, PowerSGDState) or hasattr(given, "state_dict")

    def num_bytes(self, bucket: Bucket, world_size: int) -> int:
        """Sent plus received by this rank for ``bucket``, asked when the hook is through with it.

        A hook that does not say is counted as if it all-reduced the gradients as they are.
        """
        if hasattr(self.given, "num_bytes"):
            return self.given.num_bytes(bucket)
        numel, itemsize = bucket.buffer().numel(), bucket.buffer().element_size()
        if isinstance(self.given, PowerSGDState):
            numel = self._powersgd_numel(self.given) or numel
        return ring_bytes(numel * (2 if self._is_half else itemsize), world_size)

    def _powersgd_numel(self, state: PowerSGDState) -> int:
        """Elements sent since the last call; 0 during its first steps, which do not compress."""
        before, self._numel_before = self._numel_before, state.total_numel_after_compression
        return self._numel_before - before

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them, of this rank."""
        if isinstance(self.given, PowerSGDState):
            return _powersgd_state(self.given)
        return self.given.state_dict() if hasattr(self.given, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.given, PowerSGDState):
            _load_powersgd_state(self.given, state)
        elif hasattr(self.given, "load_state_dict"):
            self.given.load_state_dict(state)


def _powersgd_state(state: PowerSGDState) -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = state.rng.get_state()
    return {
        **{name: dict(getattr(state, name)) for name in _POWERSGD_TENSORS},
        "iter": state.iter,
        "rng": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
    }


def _load_powersgd_state(state: PowerSGDState, saved: dict[str, Any]) -> None:
    for name in _POWERSGD_TENSORS:
        setattr(state, name, {int(index): tensor.clone() for index, tensor in saved[name].items()})
    state.iter = saved["iter"]
    keys, *rest = saved["rng"]
    state.rng.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
