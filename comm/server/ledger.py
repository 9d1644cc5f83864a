"""Who takes part in a run, what of each worker was applied, and who was lost.

At the end of a fit, on every server and for every optimizer: the steps taken are the pushes applied (in sync mode, a
push of every worker that was there makes one step). A worker that lives has got an answer to each of its pushes that
was applied; of a lost one at most the last push may have been applied without an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final


@final
@dataclass(frozen=True)
class Loss:
    """A worker without which the run went on."""

    worker: int
    reason: str
    """As in ``worker 2 was killed by SIGKILL``, without the first two words."""
    pushes: int
    """Of it that were applied before."""
    samples: int = 0
    """That went into them, as far as workers say how many."""
    incarnation: int = 0
    """Processes that were this worker before."""


class LossWatch(Protocol):
    """How a server learns of lost workers, and tells the others of the run."""

    def find(self) -> Mapping[int, str]:
        """Those lost since the last call, with the reasons; called a few times per second, on the server's thread.

        One that :meth:`tell` was not called for may come again.
        """
        ...

    def tell(self, loss: Loss) -> None:
        """The server goes on without this one."""
        ...

    def tell_back(self, worker: int) -> None:
        """Another process has taken the place of a lost worker."""
        ...

    def close(self) -> None:
        """Let go of everything; the fit has ended."""
        ...


@final
class Ledger:
    """Of one server. A push is one worker's gradients for one step of one optimizer.

    Attributes:
        applied: Pushes that are in the parameters, by worker.
        samples: How many went into those.
        losses: Of workers that are lost now, by worker.
        refused: Messages of lost workers that came too late.
        incarnations: Of every worker: how many processes were it before.
    """

    def __init__(self, num_workers: int) -> None:
        self.applied = dict.fromkeys(range(num_workers), 0)
        self.samples = dict.fromkeys(range(num_workers), 0)
        self._announced = dict(self.samples)
        self.losses: dict[int, Loss] = {}
        self.refused = 0
        self.incarnations = dict.fromkeys(range(num_workers), 0)

    @property
    def live(self) -> set[int]:
        """Workers that are not lost, those included that have left in good order."""
        return self.applied.keys() - self.losses.keys()

    def let_in(self, worker: int) -> None:
        """Another process takes the place of a lost worker."""
        del self.losses[worker]
        self.incarnations[worker] += 1
        self.samples[worker] = self._announced[worker] = 0

    def announce(self, worker: int, num_samples: int) -> None:
        """With the coming push, so many samples of ``worker`` will be in the parameters since it began."""
        self._announced[worker] = num_samples

    def apply(self, worker: int) -> None:
        """A push of ``worker`` is in the parameters."""
        self.applied[worker] += 1
        self.samples[worker] = self._announced[worker]

    def lose(self, worker: int, reason: str) -> Loss:
        """From now on nothing of ``worker`` is applied."""
        loss = Loss(worker, reason, self.applied[worker], self.samples[worker], self.incarnations[worker])
        self.losses[worker] = loss
        return loss


def identity(worker: int, incarnation: int = 0) -> bytes:
    """By which a server knows a worker's process."""
    return f"{worker}/{incarnation}".encode() if incarnation else str(worker).encode()
