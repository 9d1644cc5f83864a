"""Times every optimizer step and its communication: to TensorBoard, and to whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ..comm.timeline import TimelineLike
from .ddp_timeline import DDPTimeline
from .process_usage import ProcessUsage
from .rank_spread import SPREAD_FIGURES, may_exchange, rank_spread
from .step_breakdown import RunningMean, StepBreakdown, break_down
from .step_timer import Phase, StepTimer


@final
class CommunicationMonitor(Callback):
    """Measures on every rank, logs on rank zero; never synchronizes a device. Nothing here communicates per step.

    Where it logs, ranks in lockstep exchange three numbers each: who is the fastest and the slowest.

    Any strategy with an attribute ``timeline`` (see :mod:`gradsync.comm.timeline`) is measured, Lightning's DDP
    through its own statistics, and one device alone has no communication. A strategy that communicates inside its
    optimizer step says so by the attribute ``communicates_in_optimizer_step = True``.

    With gradient accumulation a step is one optimizer step with all its micro-batches. Put this callback before
    those that read :attr:`last_step` in ``on_train_batch_end``.

    On a GPU the phases are the host's, which runs ahead of its device; not run there yet.

    Args:
        warmup_steps: First steps of every fit that means leave out. Where a mean would be empty without them, in
            an epoch shorter than the warm-up, they count.
    """

    def __init__(self, warmup_steps: int = 5) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}: use 0 to count every step")
        self.warmup_steps = warmup_steps
        self._loop: Any = None
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self.last_step: StepBreakdown | None = None
        """The last complete step of this fit."""
        self._num_steps = 0
        self._epoch, self._run, self._window = RunningMean(), RunningMean(), RunningMean()
        self._timer = StepTimer()
        self._usage = ProcessUsage()
        self._timeline: TimelineLike | None = None
        self._num_images = 0
        self._stepped = False

    # -- for whoever asks ------------------------------------------------------------------------------------

    def epoch_summary(self) -> StepBreakdown | None:
        """Mean of the current epoch's steps (of the last epoch's, until the next one begins)."""
        return self._epoch.mean()

    def run_summary(self) -> StepBreakdown | None:
        """Mean of all steps since the fit began."""
        return self._run.mean()

    @property
    def timeline(self) -> TimelineLike | None:
        """Where the strategy's figures come from, while a fit runs."""
        return self._timeline

    def watch_phases(self, on_phase: Callable[[Phase, int, int], None] | None) -> None:
        """Have every stretch of a phase told (see :attr:`.StepTimer.on_phase`), or no longer."""
        self._timer.on_phase = on_phase

    @property
    def epoch_measured_steps(self) -> int:
        """Steps of the current epoch after the warm-up."""
        return self._epoch.num_measured

    @property
    def epoch_wall_s(self) -> float:
        """Wall time of all the current epoch's steps, the warm-up included, validation left out."""
        return self._epoch.wall_ms / 1000.0

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._detach()
            self._reset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._timeline = _timeline_of(trainer)
        self._in_optimizer_step = bool(getattr(trainer.strategy, "communicates_in_optimizer_step", False))
        self._after_optimizer_step: Phase = "other" if pl_module.automatic_optimization else "compute"
        self._handles = [o.register_step_post_hook(self._on_optimizer_stepped) for o in trainer.optimizers]
        self._watch_loader(trainer)

    def _watch_loader(self, trainer: pl.Trainer) -> None:
        # No callback hook runs before a batch is fetched, and the time since the last one holds a collective of
        # Lightning's. This is where its profiler listens. The loop reads the attribute once per epoch.
        self._loop = trainer.fit_loop.epoch_loop
        original = self._loop._on_before_fetch

        def before_fetch() -> None:
            self._timer.enter("data")
            original()

        self._loop._on_before_fetch = before_fetch

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._loop is not None:
            self._loop.__dict__.pop("_on_before_fetch", None)
            self._loop = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()
        self._timeline = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()
        self._timeline = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The epoch so far: a fit that resumes in mid-epoch, or at its very end, still reports all of it."""
        return {"epoch": self._epoch.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch.load_state_dict(state_dict["epoch"])

    # -- phases of a step ------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = RunningMean()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._timer.enter("compute")
        self._num_images += _batch_size(batch) * trainer.world_size

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._timer.enter("optimizer")
        self._stepped = True

    def _on_optimizer_stepped(self, *_: Any) -> None:
        self._timer.enter(self._after_optimizer_step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._timer.enter("other")
        if self._stepped:
            self._end_step(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._timer.pause()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._timer.pause()

    def _end_step(self, trainer: pl.Trainer) -> None:
        step = break_down(
            self._timer.take_ms(),
            self._timeline.take_step() if self._timeline is not None else None,
            num_images=self._num_images,
            in_optimizer_step=self._in_optimizer_step,
        )
        self.last_step = step
        self._num_steps += 1
        self._num_images = 0
        self._stepped = False
        for mean in (self._epoch, self._run, self._window):
            mean.add(step, warmup=self._num_steps <= self.warmup_steps)
        # As Lightning's own callbacks do, so that all curves have their points at the same steps.
        if trainer._logger_connector.should_update_logs:
            self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        """Write the mean of the steps since the last time."""
        window, self._window = self._window.mean(), RunningMean()
        if window is None or not trainer.loggers:
            return
        metrics = {**window.metrics(), **self._usage.take()}
        if may_exchange(trainer):
            for name, (low, high) in rank_spread(trainer, window).items():
                metrics |= {f"{SPREAD_FIGURES[name]}_min": low, f"{SPREAD_FIGURES[name]}_max": high}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def monitor_of(trainer: pl.Trainer) -> CommunicationMonitor | None:
    """The first one among the Trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback for callback in callbacks if isinstance(callback, CommunicationMonitor)), None)


def _timeline_of(trainer: pl.Trainer) -> TimelineLike | None:
    model = trainer.strategy.model
    ddp = DDPTimeline(model) if isinstance(model, DistributedDataParallel) else None
    return getattr(trainer.strategy, "timeline", ddp)


def _batch_size(batch: Any) -> int:
    """First dimension of the first tensor in `batch`; 0 where there is none."""
    return next((leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)
