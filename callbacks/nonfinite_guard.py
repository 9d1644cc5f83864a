"""NaN and infinite gradients: the step is left out or the run stopped, on all ranks, before they reach a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..errors import UserError
from .run_store import exchange, in_lockstep

OnNonfinite = Literal["stop", "skip", "ignore"]
_MOST_IN_A_ROW = 25
_PATIENCE = timedelta(seconds=5)


@final
class NonfiniteGuard(Callback):
    """Looks at every gradient before the optimizer does, under every strategy.

    A step is left out by taking its gradients away, so neither weights nor optimizer state see them; BatchNorm's
    statistics, which the forward pass may have spoiled, are put back. No checkpoint with such values is written.
    Where a loss scaler looks for infinities itself (``16-mixed``) gradients are left to it.

    Args:
        on_nonfinite: ``stop`` the run, ``skip`` the step (but stop after 25 in a row), or ``ignore``.

    Attributes:
        skipped: Global steps that were left out.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop") -> None:
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.skipped: list[int] = []
        self._in_a_row = 0
        self._loss: Tensor | None = None
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._step_begins = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.skipped, self._in_a_row, self._step_begins = [], 0, True
        self._buffers = [b for b in pl_module.buffers() if b.is_floating_point()]
        self._saved = [b.clone() for b in self._buffers]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.on_nonfinite == "skip" and self._step_begins and self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)
        self._step_begins = False

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._step_begins = True
        if self.on_nonfinite == "ignore" or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        own = _is_any_nonfinite(p.grad for p in pl_module.parameters() if p.grad is not None)
        if not _on_any_rank(trainer.strategy, own):
            self._in_a_row = 0
            return
        what = self._describe(trainer, pl_module)
        self._in_a_row += 1
        if self.on_nonfinite == "stop":
            raise UserError(
                f"{what}. Neither weights nor checkpoints have it. Lower --model.optimizer.lr, clip with "
                "--trainer.gradient_clip_val, or leave such steps out with --on_nonfinite skip"
            )
        if self._in_a_row >= _MOST_IN_A_ROW:
            raise UserError(
                f"{what}, as in the {_MOST_IN_A_ROW - 1} steps before: --on_nonfinite skip does not help here"
            )
        self._skip(trainer, pl_module)
        rank_zero_warn(f"{what}: step left out, {len(self.skipped)} so far")

    @torch.no_grad()
    def _skip(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.skipped.append(trainer.global_step)
        for parameter in pl_module.parameters():
            parameter.grad = None
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Step, first parameter and rank; ranks in step compare what they know, in the store of the run."""
        strategy = trainer.strategy
        names = [n for n, p in pl_module.named_parameters() if p.grad is not None and _is_any_nonfinite([p.grad])]
        own = {"loss": self._loss is not None and not bool(self._loss.isfinite().all()), "names": names}
        known = {trainer.global_rank: own}
        if in_lockstep(strategy) and trainer.world_size > 1:
            known = {rank: json.loads(text) for rank, text in exchange(trainer, json.dumps(own), _PATIENCE).items()}
        guilty = [rank for rank, one in known.items() if one["loss"]]
        if not guilty and not _are_averages(strategy) and getattr(strategy, "communicates_in_optimizer_step", False):
            guilty = [rank for rank, one in known.items() if one["names"]]  # gradients have not travelled yet
        names = names or next((one["names"] for one in known.values() if one["names"]), ["a parameter"])
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        whose = f"on rank {', '.join(map(str, guilty))}" if guilty else "the loss was finite on every rank"
        return f"step {trainer.global_step}: the gradient of {names[0]}{more} is NaN or infinite ({whose})"

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finite gradients can make infinite weights, too."""
        if self.on_nonfinite == "ignore":
            return
        for name, value in _tensors(checkpoint.get("state_dict", {})):
            if _is_any_nonfinite([value]):
                raise UserError(
                    f"step {trainer.global_step}: {name} is NaN or infinite: no such checkpoint is written, earlier "
                    "ones are kept. Lower --model.optimizer.lr, or save all the same with --on_nonfinite ignore"
                )


def _is_any_nonfinite(tensors: Iterable[Tensor]) -> bool:
    """One pass over each, no copies, one wait for the device."""
    floats = [t for t in tensors if (t.is_floating_point() or t.is_complex()) and t.numel()]
    if not floats:
        return False
    # The Euclidean norm: on the CPU 13 times as fast as the largest magnitude. It may overflow, so look again then.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(floats)])
    return not bool(norms.isfinite().all()) and not all(bool(t.isfinite().all()) for t in floats)


def _are_averages(strategy: Any) -> bool:
    """Whether every rank holds the same gradients when the optimizer steps."""
    return isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)) or getattr(strategy, "averages_gradients", False)


def _on_any_rank(strategy: Any, own: bool) -> bool:
    """All ranks decide alike, so that they stay in step."""
    if _are_averages(strategy) or not in_lockstep(strategy):
        return own
    return bool(strategy.reduce_boolean_decision(own, all=False))


def _tensors(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))
