"""Do two loss curves agree, as far as their repeats or the scatter of their steps can tell?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from .comparison import Comparison, Group, plural
from .curves import finite_values, pointwise_median, running_mean, window_of
from .figures import NAN, Spread, largest, mean, ratio, shown, shown_count, shown_loss

_EQUAL_FROM = 1e-3
"""Curves closer than this, in terms of the mean loss, agree whatever the scatter of their steps."""
_STANDARD_ERRORS = 4
"""What the largest of some dozens of independent differences rarely exceeds by chance."""


@final
@dataclass(frozen=True)
class Agreement:
    """The judgement on a group's loss curve."""

    group: Group
    reference: Group
    agrees: bool | None
    """None: the files cannot tell."""
    text: str
    """A sentence with the figures that it rests on."""


@final
@dataclass(frozen=True)
class LossCurve:
    """The loss curve of a group: the median over its repeats."""

    raw: list[float]
    smooth: list[float]
    window: int
    between_repeats: float
    """Largest distance of the repeats' smoothed curves from each other; NaN for one repeat."""

    @staticmethod
    def of(group: Group, steps: int | None = None) -> LossCurve:
        """Of the first `steps` steps, or of all."""
        curves = [result.all_losses[:steps] for result in group.results if result.all_losses]
        raw = pointwise_median(curves)
        window = window_of(len(raw))
        smooth = [running_mean(curve, window) for curve in curves]
        return LossCurve(raw, running_mean(raw, window), window, _width(smooth))

    @property
    def reach(self) -> int:
        """How many steps the first and the last smoothed value, the least certain ones, are means of."""
        return self.window // 2 + 1

    @property
    def noise(self) -> float:
        """Standard error of the smoothed values, from how much neighbouring steps differ; NaN if none do."""
        jumps = mean((b - a) ** 2 for a, b in pairwise(self.raw)) / 2
        return math.sqrt(jumps / self.reach)


def agreement_of(comparison: Comparison, group: Group) -> Agreement | None:
    """How `group` agrees with the baseline, or without one with the first method that has as many processes.

    None for that method itself.
    """
    same_size = [other for other in comparison.groups if other.training_processes == group.training_processes]
    reference = comparison.baseline_of(group) or same_size[0]
    if reference is group:
        return None
    agrees, text = _compare(group, reference, comparison.label(group), comparison.label(reference))
    return Agreement(group, reference, agrees, text)


def _compare(group: Group, reference: Group, name: str, other: str) -> tuple[bool | None, str]:
    ours, theirs = LossCurve.of(group).raw, LossCurve.of(reference).raw
    batches = [each.results[0].global_batch_size for each in (group, reference)]
    if batches[0] != batches[1] and not any(map(math.isnan, batches)):
        return None, (
            f"The loss curves of {name} and {other} are not compared step by step: a step is "
            f"{shown_count(batches[0])} images here and {shown_count(batches[1])} there."
        )
    common = len(finite_values([a + b for a, b in zip(ours, theirs, strict=False)]))
    if not common:
        return None, f"The loss curves of {name} and {other} cannot be compared: no step has a finite loss in both."
    where = f"all {common} steps"
    if not common == len(ours) == len(theirs):
        where = f"the {plural(common, 'step')} with a finite loss in both (of {len(ours)} and {len(theirs)})"
    steps = min(len(ours), len(theirs))
    agrees, text = _judge(LossCurve.of(group, steps), LossCurve.of(reference, steps), name, other)
    return agrees, f"Over {where}, {text}"


def _judge(ours: LossCurve, theirs: LossCurve, name: str, other: str) -> tuple[bool | None, str]:
    apart, _ = _largest_distance(ours.raw, theirs.raw)
    typical = mean(abs(value) for value in theirs.raw)
    if apart == 0:
        return True, f"{name} has exactly the losses of {other}, digit by digit: the curves agree."
    if apart <= _EQUAL_FROM * typical:
        share = f"{shown(ratio(apart, typical) * 100)} % of the mean loss"
        return True, f"{name} differs from {other} by at most {shown_loss(apart)} ({share}): the curves agree."
    apart, step = _largest_distance(ours.smooth, theirs.smooth)
    shift = mean(a - b for a, b in zip(ours.smooth, theirs.smooth, strict=True))
    agrees, reason = _conclude(ours, theirs, apart, abs(shift))
    verdict = {True: "the curves agree within that", False: "the curves do not agree", None: ""}[agrees]
    return agrees, (
        f"the curves of {name} and {other} (running means over {plural(ours.window, 'step')}) are up to "
        f"{shown_loss(apart)} apart, at step {step}, and the first is on average {shown_loss(abs(shift))} "
        f"{'higher' if shift > 0 else 'lower'}; {reason}{verdict}."
    )


def _conclude(ours: LossCurve, theirs: LossCurve, apart: float, shift: float) -> tuple[bool | None, str]:
    """Whether equal methods could be that far apart: judged by their repeats, else by the scatter of single steps."""
    spread = largest((ours.between_repeats, theirs.between_repeats))
    if spread > 0:
        return apart <= spread, f"repeats of one method differ by up to {shown_loss(spread)}: "
    noise = math.hypot(ours.noise, theirs.noise)
    if math.isnan(noise):
        return None, "too few steps to tell whether the curves agree"
    most, most_shift = _STANDARD_ERRORS * noise, _STANDARD_ERRORS * noise / math.sqrt(len(ours.raw) / ours.reach)
    return apart <= most and shift <= most_shift, (
        f"chance explains distances up to {shown_loss(most)} and a shift of {shown_loss(most_shift)} "
        f"({_STANDARD_ERRORS} standard errors of the steps' scatter): "
    )


def _largest_distance(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, int]:
    """The distance, and the step (from 1) where it is that large."""
    apart = [(abs(a - b), step) for step, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1)]
    return max((pair for pair in apart if not math.isnan(pair[0])), default=(NAN, 0))


def _width(curves: Sequence[Sequence[float]]) -> float:
    if len(curves) < 2:
        return NAN
    spreads = (Spread.of(values) for values in zip(*curves, strict=False))
    return max((spread.high - spread.low for spread in spreads if spread.count), default=NAN)
