"""What a run came to, in its TensorBoard run: an HParams entry, tables as text, and a picture of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from .communication_monitor import monitor_of
from .results_record import describe_run
from .run_environment import run_environment, strategy_flag, strategy_options
from .step_breakdown import StepBreakdown

_PARTS = {
    "data": ("data_ms", "#BBBBBB"),
    "compute": ("compute_ms", "#4477AA"),
    "exposed communication": ("exposed_ms", "#EE6677"),
    "optimizer": ("optimizer_ms", "#CCBB44"),
    "other": ("other_ms", "#666666"),
}
"""Parts of a step in their order, and their colours (Paul Tol's bright scheme, told apart by colour-blind eyes)."""
_ENVIRONMENT = ("backend", "accelerator", "seed", "cpu_model", "cpu_count", "torch", "lightning", "gradsync", "commit")


@final
class RunSummary(Callback):
    """Writes when training ends, on rank zero, to every TensorBoard logger. Needs a CommunicationMonitor before it."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Now, since a schedule has ended at zero when the run has.
        self._lr = trainer.optimizers[0].param_groups[0].get("initial_lr") if trainer.optimizers else None
        if self._lr is None and trainer.optimizers:
            self._lr = trainer.optimizers[0].param_groups[0].get("lr")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor = monitor_of(trainer)
        mean = monitor.run_summary() if monitor is not None else None
        metrics = trainer.callback_metrics  # on every rank: computing a metric can be collective
        if mean is None or not trainer.is_global_zero:
            return
        choices = self._choices(trainer)
        outcome = _outcome(mean, metrics)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _write(logger.experiment, trainer, choices, outcome, mean)

    def _choices(self, trainer: pl.Trainer) -> dict[str, Any]:
        run = describe_run(trainer)
        return {
            "strategy": strategy_flag(trainer.strategy),
            "world_size": run["world_size"],
            "batch_size": run["batch_size"] or 0,
            "learning_rate": float(self._lr or 0.0),
            "precision": str(trainer.precision),
        }


def _outcome(mean: StepBreakdown, metrics: Mapping[str, Any]) -> dict[str, float]:
    """For the HParams tab: tags of their own, so that no curve gets a second last point."""
    outcome = {"summary/images_per_s": mean.images_per_s, "summary/comm_share_pct": mean.share_pct}
    if "val/top1" in metrics:
        outcome["summary/top1"] = float(metrics["val/top1"])
    return outcome


def _write(
    writer: SummaryWriter,
    trainer: pl.Trainer,
    choices: dict[str, Any],
    outcome: dict[str, float],
    mean: StepBreakdown,
) -> None:
    for tag, value in outcome.items():
        writer.add_scalar(tag, value, trainer.global_step)
    for summary in hparams(choices, outcome):  # not add_hparams: that makes a run of its own
        writer._get_file_writer().add_summary(summary)
    writer.add_text("summary", _text(trainer, choices, outcome, mean), trainer.global_step)
    writer.add_figure("step breakdown", draw_step(choices["strategy"], mean), trainer.global_step)
    writer.flush()


def _text(trainer: pl.Trainer, choices: dict[str, Any], outcome: dict[str, float], mean: StepBreakdown) -> str:
    """Markdown."""
    environment = run_environment(trainer)
    rows = [(name, getattr(mean, attribute)) for name, (attribute, _) in _PARTS.items()]
    steps = [(name, f"{ms:.1f}", f"{100 * ms / mean.step_ms:.1f}") for name, ms in [*rows, ("step", mean.step_ms)]]
    run = [*choices.items(), *strategy_options(trainer.strategy).items()]
    return "\n\n".join(
        [
            _table(("result", "value"), [(tag.split("/")[1], f"{value:.4g}") for tag, value in outcome.items()]),
            _table(("part of a step", "ms", "%"), steps),
            _table(("run", "value"), run),
            _table(("environment", "value"), [(key, environment[key]) for key in _ENVIRONMENT]),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def draw_step(name: str, mean: StepBreakdown) -> Any:
    """A matplotlib figure: one bar, the parts of an average step from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.add_subplot()
    left = 0.0
    for label, (attribute, colour) in _PARTS.items():
        width = getattr(mean, attribute)
        axes.barh([name], [width], left=left, color=colour, label=f"{label} {width:.1f} ms", edgecolor="white")
        left += width
    axes.set_xlabel("time of an average step on rank 0 (ms)")
    axes.set_xlim(0, left)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(_PARTS), frameon=False, fontsize=8)
    return figure
