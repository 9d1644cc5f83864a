"""Where the time of an optimizer step went, and the mean of many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ..comm.timeline import StepCommunication
from .step_timer import Phase

_NO_COMMUNICATION = StepCommunication(total_ms=0.0, exposed_ms=0.0, num_bytes=0)


@final
@dataclass(frozen=True)
class StepBreakdown:
    """One optimizer step with all its micro-batches, or the mean of ``num_steps`` of them, on one rank.

    ``data_ms + compute_ms + exposed_ms + optimizer_ms + other_ms == step_ms``. Communication that ran beside
    computation (``overlapped_ms``) is part of ``compute_ms``.
    """

    step_ms: float
    """Wall time from the end of the previous step to the end of this one; validation in between is left out."""
    data_ms: float
    """From asking the loader to the batch being ready on its device."""
    compute_ms: float
    """Forward and backward passes, less the exposed communication."""
    exposed_ms: float
    """What training waited for communication."""
    optimizer_ms: float
    """Clipping and the optimizer's update; where a server steps, its time."""
    other_ms: float
    """The rest: logging, other callbacks, learning rate schedulers, Lightning itself."""
    total_ms: float = 0.0
    overlapped_ms: float = 0.0
    num_bytes: float = 0.0
    push_ms: float | None = None
    pull_ms: float | None = None
    wait_ms: float | None = None
    staleness: float | None = None
    total_is_upper_bound: bool = False
    num_images: float = 0.0
    """Samples of the step, all ranks together (this rank's times the number of ranks)."""
    num_steps: int = 1

    @property
    def share_pct(self) -> float:
        """Exposed communication in percent of the step."""
        return 100.0 * self.exposed_ms / self.step_ms if self.step_ms else 0.0

    @property
    def images_per_s(self) -> float:
        return 1000.0 * self.num_images / self.step_ms if self.step_ms else 0.0

    def metrics(self) -> dict[str, float]:
        """The figures under their TensorBoard tags; those that the strategy does not have are missing."""
        tags: dict[str, float | None] = {
            "comm/exposed_ms": self.exposed_ms,
            "comm/total_ms": self.total_ms,
            "comm/overlapped_ms": self.overlapped_ms,
            "comm/share_pct": self.share_pct,
            "comm/bytes": self.num_bytes,
            "comm/push_ms": self.push_ms,
            "comm/pull_ms": self.pull_ms,
            "comm/wait_ms": self.wait_ms,
            "comm/staleness": self.staleness,
            "time/data_ms": self.data_ms,
            "time/compute_ms": self.compute_ms,
            "time/optimizer_ms": self.optimizer_ms,
            "time/other_ms": self.other_ms,
            "perf/step_ms": self.step_ms,
            "perf/images_per_s": self.images_per_s,
        }
        return {tag: value for tag, value in tags.items() if value is not None}


def break_down(
    phases_ms: Mapping[Phase, float],
    communication: StepCommunication | None,
    *,
    num_images: float = 0.0,
    in_optimizer_step: bool = False,
) -> StepBreakdown:
    """Put the phases of one step and its communication together.

    Exposed communication lies inside the compute phase, or inside the optimizer phase where the strategy
    communicates there (``in_optimizer_step``): then a server steps, and what is left of that phase is `other`.
    Ranks that step themselves say how much of it lay there (``exposed_in_optimizer_ms``).
    Where the host ran ahead of its device, the phase can be shorter than the wait it contains: the difference is
    taken from `other`, and the wait is never longer than both.
    """
    comm = communication or _NO_COMMUNICATION
    left = dict(phases_ms)
    step_ms = sum(left.values())
    home: Phase = "optimizer" if in_optimizer_step else "compute"
    in_own_step_ms = 0.0 if in_optimizer_step else min(comm.exposed_in_optimizer_ms, left["optimizer"])
    left["optimizer"] -= in_own_step_ms
    exposed_ms = min(comm.exposed_ms - in_own_step_ms, left[home] + left["other"])
    left[home] -= exposed_ms
    exposed_ms += in_own_step_ms
    if in_optimizer_step:
        optimizer_ms = max(0.0, min(comm.server_optimizer_ms or 0.0, left["optimizer"]))
        left["other"] += left["optimizer"] - optimizer_ms
        left["optimizer"] = optimizer_ms
    elif left[home] < 0.0:
        left["other"] += left[home]
        left[home] = 0.0
    return StepBreakdown(
        step_ms=step_ms,
        data_ms=left["data"],
        compute_ms=left["compute"],
        exposed_ms=exposed_ms,
        optimizer_ms=left["optimizer"],
        other_ms=left["other"],
        total_ms=comm.total_ms,
        overlapped_ms=max(0.0, comm.total_ms - exposed_ms),
        num_bytes=comm.num_bytes,
        push_ms=comm.push_ms,
        pull_ms=comm.pull_ms,
        wait_ms=comm.wait_ms,
        staleness=comm.staleness,
        total_is_upper_bound=comm.total_is_upper_bound,
        num_images=num_images,
    )


@final
class RunningMean:
    """The mean of steps. Warm-up steps are kept apart: they count only as long as there is nothing else."""

    def __init__(self) -> None:
        self._measured: StepBreakdown | None = None
        self._warmup: StepBreakdown | None = None

    def add(self, step: StepBreakdown, *, warmup: bool = False) -> None:
        """Take in `step`, or a mean of steps with the weight of all of them."""
        if warmup:
            self._warmup = _weighted_mean(self._warmup, step)
        else:
            self._measured = _weighted_mean(self._measured, step)

    def mean(self) -> StepBreakdown | None:
        """Mean over the measured steps; over the warm-up where nothing else was seen; None where nothing was."""
        return self._measured or self._warmup

    @property
    def num_measured(self) -> int:
        return self._measured.num_steps if self._measured else 0

    @property
    def wall_ms(self) -> float:
        """Wall time of all steps together, the warm-up included."""
        return sum(part.step_ms * part.num_steps for part in (self._measured, self._warmup) if part)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only, so that a checkpoint stays loadable with ``weights_only=True``."""
        parts = {"measured": self._measured, "warmup": self._warmup}
        return {name: dataclasses.asdict(part) for name, part in parts.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._measured = StepBreakdown(**state["measured"]) if "measured" in state else None
        self._warmup = StepBreakdown(**state["warmup"]) if "warmup" in state else None


def _weighted_mean(mean: StepBreakdown | None, step: StepBreakdown) -> StepBreakdown:
    """Both are means of ``num_steps`` steps; a figure that one of them lacks counts as 0 there."""
    if mean is None:
        return step
    num_steps = mean.num_steps + step.num_steps
    values: dict[str, Any] = {}
    for field in dataclasses.fields(StepBreakdown):
        old, new = getattr(mean, field.name), getattr(step, field.name)
        if old is None and new is None:
            values[field.name] = None
        else:
            values[field.name] = ((old or 0.0) * mean.num_steps + (new or 0.0) * step.num_steps) / num_steps
    values["total_is_upper_bound"] = mean.total_is_upper_bound or step.total_is_upper_bound
    values["num_steps"] = num_steps
    return StepBreakdown(**values)
