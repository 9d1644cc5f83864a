"""A run that has failed is started again: what its processes leave for the supervisor, and when it does so."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

import numpy as np

from .processes import FAILURES, RUN_DIR

_RESTART = "GRADSYNC_RESTART"
_MAX_PROCESSES: Final = 4096
_PLAN: Final = "restarts.plan"
_PROGRESS: Final = "updates.count"


@final
@dataclass(frozen=True)
class Restart:
    """This run is one that was started again.

    Attributes:
        number: From 1.
        of: How often the run may be started again.
        updates: How many optimizer updates had been made when it failed.
        begun: When the run was first started, in seconds since the epoch.
    """

    number: int
    of: int
    updates: int
    begun: float

    @classmethod
    def this(cls) -> Restart | None:
        """Of this process's run; None in one that was not started again."""
        return cls(**json.loads(os.environ[_RESTART])) if _RESTART in os.environ else None

    def announce(self) -> None:
        """To the processes that this one starts from now on."""
        os.environ[_RESTART] = json.dumps(asdict(self))


@final
class Progress:
    """Optimizer updates of a run on one host, in a file that its processes map: still there when they are not."""

    def __init__(self) -> None:
        path = Path(os.environ[FAILURES], _PROGRESS)
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(bytes(8 * (1 + _MAX_PROCESSES)))  # a full disk is found now, and not by SIGBUS
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        self._counts = np.memmap(path, np.int64, "r+")

    @classmethod
    def of_run(cls) -> Progress | None:
        """None where nobody counts."""
        return cls() if Path(os.environ.get(FAILURES, ""), _PROGRESS).exists() else None

    def begin(self, updates: int) -> None:
        """The run goes on from a checkpoint of so many updates."""
        self._counts[0] = updates

    def note(self, updates: int) -> None:
        """So many have been made since, as far as this process knows."""
        self._counts[1 + int(os.environ.get("LOCAL_RANK", "0"))] = updates

    def total(self) -> int:
        return int(self._counts[0] + self._counts[1:].max())


def plan_restarts(at_most: int, run_dir: Path) -> None:
    """The run has come to training: from now on it is started again when it fails, and finds its checkpoints there."""
    path = Path(os.environ[FAILURES], _PLAN)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"at_most": at_most, "run_dir": str(run_dir)}))
    part.rename(path)


@final
class Restarts:
    """The supervisor's side: when a run is started again."""

    def __init__(self) -> None:
        self._number = 0
        self._begun = time.time()
        self._failed_at: int | None = None

    def next(self, code: int) -> Restart | None:
        """What to do about a run that has ended with ``code``; None: that was all.

        Whoever fails twice after the same update would fail a third time.
        """
        path = Path(os.environ[FAILURES], _PLAN)
        if code == 0 or not path.exists():
            return None
        plan, updates = json.loads(path.read_text()), Progress().total()
        if self._number >= plan["at_most"]:
            return None
        if updates == self._failed_at:
            print(f"gradsync: not started again: update {updates} was the last one before, too", file=sys.stderr)
            return None
        self._number += 1
        self._failed_at = updates
        os.environ[RUN_DIR] = plan["run_dir"]
        return Restart(self._number, plan["at_most"], updates, self._begun)
