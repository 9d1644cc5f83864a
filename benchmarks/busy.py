"""Whether the machine had other things to do: then a bound in seconds is three times as long."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import final

_BUSY_LOAD = 3.0
ALLOWED_WHEN_BUSY = 3
_BUSY_STOLEN_PCT = 2.0
_LATE_S = 0.25
_EVERY_S = 0.05


@final
class Busy:
    """Looks at the machine, in a thread, until it is stopped.

    The load average alone tells of a burst when it is over, and never of a host that stops this machine for a while.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, float]] = []
        """When, how many threads ran or waited for a core, and how many seconds too late this was looked at."""
        self._stolen = [(time.monotonic(), *_stolen())]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="busy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        planned = time.monotonic()
        while not self._ended.wait(max(0.0, planned - time.monotonic())):
            now = time.monotonic()
            self._samples.append((now, _num_running() - 1, now - planned))
            self._stolen.append((now, *_stolen()))
            planned = now + _EVERY_S

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def since(self, at: float) -> bool:
        """Whether it was busy after ``at``, of ``time.monotonic``."""
        if os.getloadavg()[0] >= _BUSY_LOAD:
            return True
        lately = [sample for sample in self._samples if sample[0] >= at] or self._samples[-1:]
        if not lately or max(late for _, _, late in lately) >= _LATE_S:
            return True  # it did not even come to look
        if sum(running for _, running, _ in lately) / len(lately) >= _BUSY_LOAD:
            return True
        before = max((ticks for ticks in self._stolen if ticks[0] <= at), default=self._stolen[0])
        _, stolen, total = self._stolen[-1]
        return 100 * (stolen - before[1]) >= _BUSY_STOLEN_PCT * max(1, total - before[2])

    def bound_s(self, seconds: float, at: float) -> float:
        """``seconds`` on a quiet machine; how many are allowed for what began ``at``."""
        return seconds * (ALLOWED_WHEN_BUSY if self.since(at) else 1)


def _num_running() -> int:
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])


def _stolen() -> tuple[int, int]:
    """Processor time that the host gave to others, and all of it, in ticks."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)
