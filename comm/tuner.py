"""Finds the bucket size that makes steps shortest here, while training goes on.

Asked for in https://github.com/pytorch/pytorch/issues/118421: the best size depends on model, ranks and network, and
can only be found by trying.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import final

import torch
import torch.distributed as dist

CANDIDATES_MIB = (1.0, 4.0, 10.0, 25.0, 50.0, 100.0)
_WARMUP_STEPS = 1
_TIMED_STEPS = 4


@final
class BucketTuner:
    """Tries every size for a few steps, then stays with the best. Called on all ranks in the same steps.

    Args:
        group: Gloo group over which the ranks agree.
        log: Takes the table of what was seen, on rank 0.
        candidates_mib: Sizes to try, in this order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        log: Callable[[str], None],
        candidates_mib: tuple[float, ...] = CANDIDATES_MIB,
    ) -> None:
        self._group = group
        self._log = log
        self._candidates = candidates_mib
        self._samples_ms: list[list[float]] = [[] for _ in candidates_mib]
        self._steps = 0
        self._last_ns = 0
        self.best_mib: float | None = None
        """None as long as sizes are tried."""

    @property
    def first_mib(self) -> float:
        return self._candidates[0]

    def step_begins(self) -> float | None:
        """Called before every step; the size to go on with where that changes, else None. Blocks when all are tried."""
        if self.best_mib is not None:
            return None
        now_ns = time.perf_counter_ns()
        per_candidate = _WARMUP_STEPS + _TIMED_STEPS
        candidate, step = divmod(self._steps - 1, per_candidate)  # of the step that has just ended
        if self._steps and step >= _WARMUP_STEPS:
            self._samples_ms[candidate].append((now_ns - self._last_ns) / 1e6)
        self._last_ns = now_ns
        self._steps += 1
        if step < per_candidate - 1:
            return None
        return self._candidates[candidate + 1] if candidate + 1 < len(self._candidates) else self._decide()

    def _decide(self) -> float:
        """The size with the shortest median step, averaged over ranks: the same on all of them."""
        medians_ms = torch.tensor([statistics.median(samples) for samples in self._samples_ms], dtype=torch.float64)
        dist.all_reduce(medians_ms, group=self._group)
        medians_ms /= dist.get_world_size(self._group)
        best = int(medians_ms.argmin())
        self.best_mib = self._candidates[best]
        if dist.get_rank(self._group) == 0:
            self._log(self._table(medians_ms.tolist(), best))
        return self.best_mib

    def _table(self, medians_ms: list[float], best: int) -> str:
        lines = [
            f"  {size:5g} MiB  {time_ms:8.1f} ms{'  <- chosen' if number == best else ''}"
            for number, (size, time_ms) in enumerate(zip(self._candidates, medians_ms, strict=True))
        ]
        title = f"bucket_mib auto: median step over {_TIMED_STEPS} steps, mean over ranks"
        return "\n".join([title, *lines])
