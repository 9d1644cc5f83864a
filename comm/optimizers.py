"""What is known of optimizers, so that several processes may each step a part of the parameters."""

from __future__ import annotations

import torch
from torch.optim import LBFGS, Optimizer

_ELEMENTWISE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD),
)

PER_PARAMETER = frozenset({"step", "eta", "mu", "mu_product"})
"""State that the elementwise optimizers keep once per parameter. All their other tensors have its shape."""


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether an element's update depends on that element only. A subclass may do as it likes: exact types only."""
    return type(optimizer) in _ELEMENTWISE


def steps_per_tensor(optimizer: Optimizer) -> bool:
    """Whether stepping parameters in several calls equals stepping them in one, unseen by hooks.

    True for torch's own optimizers but LBFGS; others may count their steps per call.
    """
    has_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    return is_torchs and not isinstance(optimizer, LBFGS) and not has_hooks
