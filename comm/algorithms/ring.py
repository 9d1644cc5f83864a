"""``ring``: every rank talks to its two neighbours only, and sends the least that any all-reduce can.

Phases of every bucket, which is cut into one chunk per rank:

1. *reduce-scatter*: n-1 steps in which every rank passes a chunk on, and adds its own values to the next one;
2. *all-gather*: n-1 steps in which the complete chunks go round once more.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from typing_extensions import override

from .exchange import Message, PlannedAllReduce, Step


@final
class RingAllReduce(PlannedAllReduce):
    """See the module. Sends 2 (n-1)/n of the data in 2 (n-1) steps: best for large buckets and few ranks."""

    @override
    def plan(self, numel: int) -> list[Step]:
        return ring_steps(range(self.world_size), self.rank, numel)


def ring_steps(ranks: Sequence[int], position: int, numel: int) -> list[Step]:
    """All-reduce of ``numel`` elements between ``ranks``, as the one at ``position`` sees it."""
    size = len(ranks)
    bounds = [number * numel // size for number in range(size + 1)]
    after, before = ranks[(position + 1) % size], ranks[(position - 1) % size]

    def step(first: int, adds: bool) -> Step:
        """Pass chunk ``first`` on and get the one before it."""
        out, into = first % size, (first - 1) % size
        return Step(
            outgoing=Message(after, bounds[out], bounds[out + 1]),
            incoming=Message(before, bounds[into], bounds[into + 1]),
            adds=adds,
        )

    reduce_scatter = [step(position - number, adds=True) for number in range(size - 1)]
    all_gather = [step(position + 1 - number, adds=False) for number in range(size - 1)]
    return reduce_scatter + all_gather
