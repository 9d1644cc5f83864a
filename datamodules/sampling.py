"""Which samples a rank trains on, in which order, and how a run goes on from the middle of an epoch.

The order of an epoch depends on the seed and the epoch. In step ``t`` all ranks together train on samples
``order[t * G:(t + 1) * G]``, G being the batch size times the number of ranks. So a position in the epoch is a number
of samples, and means the same for another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from .images import TrainingImages


@final
class EpochSampler(DistributedSampler[TrainingImages]):
    """Shuffled share of one rank. Lightning calls ``set_epoch``, and this hands the epoch on to the images.

    Its length is that of a whole epoch, also in one that begins at a position: Lightning counts on from there.
    """

    _start: tuple[int, int] = (0, 0)
    """Epoch and position in it."""

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        assert isinstance(self.dataset, TrainingImages)
        self.dataset.set_epoch(epoch)

    def start_at(self, epoch: int, position: int) -> None:
        """Leave out the first ``position`` samples of all ranks, in this epoch only."""
        self._start = (epoch, position)

    def starts_within(self, epoch: int) -> bool:
        return self._start[0] == epoch and self._start[1] > 0

    @override
    def __iter__(self) -> Iterator[Any]:
        assert isinstance(self.dataset, TrainingImages)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = self.dataset.reader.source.order(generator).tolist()
        rest = order[self._start[1] if self.starts_within(self.epoch) else 0 :]
        return iter(rest[self.rank : len(rest) // self.num_replicas * self.num_replicas : self.num_replicas])


@final
class ResumableLoader(DataLoader[Any]):
    """A loader over :class:`EpochSampler` whose position Lightning saves and restores with the training loop.

    Args:
        progress: Lightning's counters of batches in the epoch. Batches that loader workers have ready do not count.
        kwargs: Of the DataLoader, in which ``drop_last`` is true.
    """

    _offset = 0
    """Of the position, where one rank more or less than before makes batches end elsewhere."""

    def __init__(self, *args: Any, progress: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress

    @override
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A generator: loader workers ask for indices at once, but Lightning sets the epoch after it has called iter().
        yield from super().__iter__()

    @property
    def _epoch_sampler(self) -> EpochSampler:
        assert isinstance(self.sampler, EpochSampler)
        return self.sampler

    @property
    def _samples_per_step(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * self._epoch_sampler.num_replicas

    def state_dict(self) -> dict[str, int]:
        """On every rank the same, where all take part in every step."""
        sampler = self._epoch_sampler
        offset = self._offset if sampler.starts_within(sampler.epoch) else 0
        return {"epoch": sampler.epoch, "position": self._progress().processed * self._samples_per_step + offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Before the first batch. Lightning's counters become those of batches of today's size."""
        sampler, position = self._epoch_sampler, state["position"]
        sampler.start_at(state["epoch"], position)
        done = len(self) - (len(self.dataset) - position) // self._samples_per_step  # pyright: ignore
        self._offset = position - done * self._samples_per_step
        counters = self._progress()
        counters.completed = done - (counters.processed - counters.completed)
        counters.ready = counters.started = counters.processed = done


@final
class EvaluationLoader(DataLoader[Any]):
    """A loader that leaves out batches of which no sample could be read."""

    @override
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield from (batch for batch in super().__iter__() if batch is not None)
