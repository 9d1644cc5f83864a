"""The report's sentences on learning: do the loss curves agree, and by how much do the outcomes differ?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .agreement import LossCurve, agreement_of
from .comparison import Comparison, Group, plural
from .curves import finite_values, running_mean, window_of
from .figures import NAN, Spread, ratio, shown_loss
from .throughput import verdict


def convergence_lines(comparison: Comparison) -> list[str]:
    lines = [_course(comparison, group) for group in comparison.groups]
    for group in comparison.groups:
        agreement = agreement_of(comparison, group)
        if agreement is not None:
            lines.append(agreement.text)
            lines.append(_outcomes(comparison, group, agreement.reference))
    return [line for line in lines if line]


def _course(comparison: Comparison, group: Group) -> str:
    """Where one method's loss began and ended."""
    losses, name = LossCurve.of(group), comparison.label(group)
    values = finite_values(losses.smooth)
    if not values:
        return f"{name}: no loss per step in its files." if not losses.raw else f"{name}: no step has a finite loss."
    lost = [step for step, value in enumerate(losses.raw, start=1) if math.isnan(value)]
    broken = f"; {len(lost)} of them without a finite loss, the first at step {lost[0]}" if lost else ""
    change = "fell" if values[-1] < values[0] else "did not fall"
    many = losses.reach
    ends = f"means of the first and the last {many} steps" if many > 1 else "first and last step"
    return (
        f"{name}: the training loss {change}, {shown_loss(values[0])} -> {shown_loss(values[-1])} "
        f"({ends}), in {plural(len(losses.raw), 'step')}{broken}."
    )


def _outcomes(comparison: Comparison, group: Group, reference: Group) -> str:
    """Final losses and best accuracy, as far as both have them."""
    parts = [
        _difference("Final training loss", _final_loss(group), _final_loss(reference), ""),
        _difference("Last validation loss", _final_val_loss(group), _final_val_loss(reference), ""),
        _difference("Best validation accuracy", group.best_accuracy, reference.best_accuracy, "%"),
    ]
    found = [part for part in parts if part]
    if not found:
        return f"{comparison.label(group)} and {comparison.label(reference)} have no outcome in common to compare."
    return f"Outcomes of {comparison.label(group)} and {comparison.label(reference)}: {' '.join(found)}"


def _difference(what: str, ours: Spread, theirs: Spread, unit: str) -> str:
    if math.isnan(ours.median) or math.isnan(theirs.median):
        return ""
    apart = ours.median - theirs.median
    if unit == "%":
        values, change = f"{ours.median:.2f} and {theirs.median:.2f} %", f"{apart:+.2f} points"
    else:
        values = f"{shown_loss(ours.median)} and {shown_loss(theirs.median)}"
        change = ("+" if apart >= 0 else "") + shown_loss(apart)
        change += f", {ratio(apart, theirs.median) * 100:+.1f} %" if theirs.median > 0 else ""
    if apart == 0:
        return f"{what} {values}: equal."
    return f"{what} {values} ({change}).{verdict(ours, theirs, unit)}"


def _final_loss(group: Group) -> Spread:
    """The last value of the smoothed curve of each run; of files without a loss per step, the last epoch's mean."""

    def read(losses: Sequence[float]) -> float:
        return running_mean(losses, window_of(len(losses)))[-1] if losses else NAN

    return group.spread(lambda result: read(result.all_losses) if result.all_losses else result.epochs[-1].train_loss)


def _final_val_loss(group: Group) -> Spread:
    return group.spread(lambda result: result.epochs[-1].val_loss)
