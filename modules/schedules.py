"""Learning-rate schedules: the factor on the optimizer's learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Schedule = Literal["one_cycle", "cosine", "constant"]

_ONE_CYCLE_WARMUP = 0.3
_FIRST_FACTOR = 1 / 25


def learning_rate_factor(
    schedule: Schedule, total_steps: float, warmup_steps: int | None = None
) -> Callable[[int], float]:
    """Factor in [0, 1] for every optimizer step, counted from 0.

    All of them rise from 1/25 to 1 over ``warmup_steps``. Then ``constant`` stays, and ``cosine`` and ``one_cycle``
    fall to 0 at ``total_steps`` along half a cosine. ``one_cycle`` rises along a cosine too and, as in Smith's
    super-convergence (https://arxiv.org/abs/1708.07120), for 30 % of the steps unless told otherwise; the others
    rise on a straight line, and not at all unless told.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"--model.schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    if warmup_steps is None:
        warmup_steps = round(_ONE_CYCLE_WARMUP * total_steps) if schedule == "one_cycle" else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            risen = step / warmup_steps
            if schedule == "one_cycle":
                risen = (1 - math.cos(math.pi * risen)) / 2
            return _FIRST_FACTOR + (1 - _FIRST_FACTOR) * risen
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return (1 + math.cos(math.pi * done)) / 2

    return factor
