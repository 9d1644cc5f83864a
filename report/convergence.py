"""The report's sentences on learning: do the loss curves agree, and by how much do the outcomes differ?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from .comparison import Comparison, Group, plural
from .curves import finite_values, pointwise_median, running_mean, window_of
from .figures import NAN, Spread, mean, ratio, shown
from .throughput import verdict

_EQUAL_FROM = 1e-3
"""Curves closer than this, in terms of the loss, agree, whatever the scatter of their steps."""


@final
@dataclass(frozen=True)
class _Losses:
    """The loss curve of a group: the median over its repeats."""

    raw: list[float]
    smooth: list[float]
    window: int
    between_repeats: float
    """Largest distance of the repeats' smoothed curves from each other; NaN for one repeat."""

    @staticmethod
    def of(group: Group, steps: int | None = None) -> _Losses:
        """Of the first `steps` steps, or of all."""
        curves = [result.all_losses[:steps] for result in group.results if result.all_losses]
        raw = pointwise_median(curves)
        window = window_of(len(raw))
        smooth = [running_mean(curve, window) for curve in curves]
        return _Losses(raw, running_mean(raw, window), window, _width(smooth))

    @property
    def scatter(self) -> float:
        """Standard deviation of single steps around the smoothed curve."""
        return math.sqrt(mean((a - b) ** 2 for a, b in zip(self.raw, self.smooth, strict=True)))


def convergence_lines(comparison: Comparison) -> list[str]:
    lines = [_course(comparison, group) for group in comparison.groups]
    for group in comparison.groups:
        reference = _reference(comparison, group)
        if reference is not None:
            lines.append(_agreement(comparison, group, reference))
            lines.append(_outcomes(comparison, group, reference))
    return [line for line in lines if line]


def _reference(comparison: Comparison, group: Group) -> Group | None:
    """What `group` is compared with: the baseline; without one the first method with as many processes."""
    same_size = [other for other in comparison.groups if other.training_processes == group.training_processes]
    reference = comparison.baseline_of(group) or same_size[0]
    return None if reference is group else reference


def _course(comparison: Comparison, group: Group) -> str:
    """Where one method's loss began and ended."""
    losses, name = _Losses.of(group), comparison.label(group)
    values = finite_values(losses.smooth)
    if not values:
        return f"{name}: no loss per step in its files." if not losses.raw else f"{name}: no step has a finite loss."
    lost = [step for step, value in enumerate(losses.raw, start=1) if math.isnan(value)]
    broken = f"; {len(lost)} of them without a finite loss, the first at step {lost[0]}" if lost else ""
    change = "fell" if values[-1] < values[0] else "did not fall"
    means = (
        f"means of {plural(losses.window // 2 + 1, 'step')} at either end" if losses.window > 1 else "first and last"
    )
    return (
        f"{name}: the training loss {change}, {shown(values[0])} -> {shown(values[-1])} ({means}), "
        f"in {plural(len(losses.raw), 'step')}{broken}."
    )


def _agreement(comparison: Comparison, group: Group, reference: Group) -> str:
    ours, theirs = _Losses.of(group), _Losses.of(reference)
    name, other = comparison.label(group), comparison.label(reference)
    if not finite_values(ours.raw) or not finite_values(theirs.raw):
        return f"The loss curves of {name} and {other} cannot be compared: there are not two."
    batches = [_global_batch(group), _global_batch(reference)]
    if batches[0] != batches[1] and not any(map(math.isnan, batches)):
        return (
            f"The loss curves of {name} and {other} are not compared step by step: a step is {shown(batches[0])} "
            f"images here and {shown(batches[1])} there."
        )
    steps = min(len(ours.raw), len(theirs.raw))
    where = f"all {steps} steps"
    if len(ours.raw) != len(theirs.raw):
        where = f"the first {steps} steps, which both have ({len(ours.raw)} and {len(theirs.raw)})"
    return f"Over {where}, {_judgement(_Losses.of(group, steps), _Losses.of(reference, steps), name, other)}"


def _judgement(ours: _Losses, theirs: _Losses, name: str, other: str) -> str:
    apart, _ = _largest_distance(ours.raw, theirs.raw)
    typical = mean(abs(value) for value in theirs.raw)
    if math.isnan(apart):
        return f"{name} and {other} have no step with a finite loss in common: the curves cannot be compared."
    if apart == 0:
        return f"{name} has exactly the losses of {other}, digit by digit: the curves agree."
    if apart <= _EQUAL_FROM * typical:
        share = f"{shown(ratio(apart, typical) * 100)} % of the mean loss"
        return f"{name} differs from {other} by at most {shown(apart)} ({share}): the curves agree."
    apart, step = _largest_distance(ours.smooth, theirs.smooth)
    spread = max((w for w in (ours.between_repeats, theirs.between_repeats) if not math.isnan(w)), default=NAN)
    noise, source = (spread, "repeats of one method differ by up to")
    if not spread > 0:
        noise, source = theirs.scatter, f"single steps of {other} scatter around its own curve by"
    agree = "the curves agree within that" if apart <= noise else "the curves do not agree"
    return (
        f"the curves of {name} and {other} (running means over {plural(ours.window, 'step')}) are up to {shown(apart)} "
        f"apart, at step {step}, while {source} {shown(noise)}: {agree}."
    )


def _outcomes(comparison: Comparison, group: Group, reference: Group) -> str:
    """Final losses and best accuracy, as far as both have them."""
    parts = [
        _difference("final training loss", _final_loss(group), _final_loss(reference), ""),
        _difference("last validation loss", _final_val_loss(group), _final_val_loss(reference), ""),
        _difference("best validation accuracy", group.best_accuracy, reference.best_accuracy, "%"),
    ]
    found = [part for part in parts if part]
    if not found:
        return f"{comparison.label(group)} and {comparison.label(reference)} have no outcome in common to compare."
    return f"{comparison.label(group)} against {comparison.label(reference)}: {' '.join(found)}"


def _difference(what: str, ours: Spread, theirs: Spread, unit: str) -> str:
    if math.isnan(ours.median) or math.isnan(theirs.median):
        return ""
    apart = ours.median - theirs.median
    if unit == "%":
        values, change = f"{ours.median:.2f} and {theirs.median:.2f} %", f"{apart:+.2f} points"
    else:
        values, change = (
            f"{shown(ours.median)} and {shown(theirs.median)}",
            f"{'+' if apart >= 0 else ''}{shown(apart)}",
        )
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


def _global_batch(group: Group) -> float:
    return group.results[0].global_batch_size


def _largest_distance(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, int]:
    """The distance, and the step (from 1) where it is that large."""
    apart = [(abs(a - b), step) for step, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1)]
    return max((pair for pair in apart if not math.isnan(pair[0])), default=(NAN, 0))


def _width(curves: Sequence[Sequence[float]]) -> float:
    if len(curves) < 2:
        return NAN
    spreads = (Spread.of(values) for values in zip(*curves, strict=False))
    return max((spread.high - spread.low for spread in spreads if spread.count), default=NAN)
