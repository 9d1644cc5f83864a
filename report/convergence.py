"""The report's sentences on learning: do the loss curves agree, and by how much do the outcomes differ?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from .comparison import Comparison, Group, plural
from .curves import finite_values, pointwise_median, running_mean, window_of
from .figures import NAN, Spread, largest, mean, ratio, shown, shown_count, shown_loss
from .throughput import verdict

_EQUAL_FROM = 1e-3
"""Curves closer than this, in terms of the mean loss, agree whatever the scatter of their steps."""
_STANDARD_ERRORS = 4
"""What the largest of some dozens of independent differences rarely exceeds by chance."""


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
    def reach(self) -> int:
        """How many steps the first and the last smoothed value, the least certain ones, are means of."""
        return self.window // 2 + 1

    @property
    def noise(self) -> float:
        """Standard error of the smoothed values, from how much neighbouring steps differ; NaN if none do."""
        jumps = mean((b - a) ** 2 for a, b in pairwise(self.raw)) / 2
        return math.sqrt(jumps / self.reach)


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
    many = losses.reach
    ends = f"means of the first and the last {many} steps" if many > 1 else "first and last step"
    return (
        f"{name}: the training loss {change}, {shown_loss(values[0])} -> {shown_loss(values[-1])} "
        f"({ends}), in {plural(len(losses.raw), 'step')}{broken}."
    )


def _agreement(comparison: Comparison, group: Group, reference: Group) -> str:
    ours, theirs = _Losses.of(group).raw, _Losses.of(reference).raw
    name, other = comparison.label(group), comparison.label(reference)
    batches = [_global_batch(group), _global_batch(reference)]
    if batches[0] != batches[1] and not any(map(math.isnan, batches)):
        return (
            f"The loss curves of {name} and {other} are not compared step by step: a step is "
            f"{shown_count(batches[0])} images here and {shown_count(batches[1])} there."
        )
    common = len(finite_values([a + b for a, b in zip(ours, theirs, strict=False)]))
    if not common:
        return f"The loss curves of {name} and {other} cannot be compared: no step has a finite loss in both."
    where = f"all {common} steps"
    if not common == len(ours) == len(theirs):
        where = f"the {plural(common, 'step')} with a finite loss in both (of {len(ours)} and {len(theirs)})"
    steps = min(len(ours), len(theirs))
    return f"Over {where}, {_judgement(_Losses.of(group, steps), _Losses.of(reference, steps), name, other)}"


def _judgement(ours: _Losses, theirs: _Losses, name: str, other: str) -> str:
    apart, _ = _largest_distance(ours.raw, theirs.raw)
    typical = mean(abs(value) for value in theirs.raw)
    if apart == 0:
        return f"{name} has exactly the losses of {other}, digit by digit: the curves agree."
    if apart <= _EQUAL_FROM * typical:
        share = f"{shown(ratio(apart, typical) * 100)} % of the mean loss"
        return f"{name} differs from {other} by at most {shown_loss(apart)} ({share}): the curves agree."
    apart, step = _largest_distance(ours.smooth, theirs.smooth)
    shift = mean(a - b for a, b in zip(ours.smooth, theirs.smooth, strict=True))
    return (
        f"the curves of {name} and {other} (running means over {plural(ours.window, 'step')}) are up to "
        f"{shown_loss(apart)} apart, at step {step}, and the first is on average {shown_loss(abs(shift))} "
        f"{'higher' if shift > 0 else 'lower'}; {_conclusion(ours, theirs, apart, abs(shift))}."
    )


def _conclusion(ours: _Losses, theirs: _Losses, apart: float, shift: float) -> str:
    """Whether equal methods could be that far apart: judged by their repeats, else by the scatter of single steps."""
    spread = largest((ours.between_repeats, theirs.between_repeats))
    if spread > 0:
        verdict = "the curves agree within that" if apart <= spread else "the curves do not agree"
        return f"repeats of one method differ by up to {shown_loss(spread)}: {verdict}"
    noise = math.hypot(ours.noise, theirs.noise)
    if math.isnan(noise):
        return "too few steps to tell whether the curves agree"
    most, most_shift = _STANDARD_ERRORS * noise, _STANDARD_ERRORS * noise / math.sqrt(len(ours.raw) / ours.reach)
    agree = apart <= most and shift <= most_shift
    return (
        f"chance explains distances up to {shown_loss(most)} and a shift of {shown_loss(most_shift)} "
        f"({_STANDARD_ERRORS} standard errors of the steps' scatter): "
        f"{'the curves agree within that' if agree else 'the curves do not agree'}"
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
