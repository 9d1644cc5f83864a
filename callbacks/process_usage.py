"""What this process takes of its host, between two questions."""

from __future__ import annotations

import resource
import time
from typing import final

_BYTES_PER_MIB = 1024 * 1024


@final
class ProcessUsage:
    """Costs a few microseconds per :meth:`take`; sees this process and its threads, not loader processes."""

    def __init__(self) -> None:
        self._before = self._now()

    def take(self) -> dict[str, float]:
        """Under TensorBoard tags: processor time in percent of one core and page faults per second since the last
        call, and the resident memory of now in MiB."""
        before, self._before = self._before, self._now()
        wall_s, cpu_s, faults = (now - then for now, then in zip(self._before, before, strict=True))
        return {
            "system/cpu_pct": 100.0 * cpu_s / max(wall_s, 1e-9),
            "system/rss_mib": _resident_bytes() / _BYTES_PER_MIB,
            "system/page_faults_per_s": faults / max(wall_s, 1e-9),
        }

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
