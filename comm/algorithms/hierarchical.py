"""``hierarchical``: one rank per host speaks for the others, so that every bucket crosses the network once.

Phases of every bucket; the *leader* is the first rank of its host:

1. *reduce*: each host's ranks form a chain that ends at the leader; every one adds its values and passes them on;
2. *all-reduce*: a ring between the leaders, as in :mod:`.ring`;
3. *broadcast*: the chain backwards.

A chain passes pieces on as they come, so that its length costs little, and nobody gets a bucket more than once per
phase. All of it is messages in one group. Groups of their own for hosts and leaders would have to be made by ranks
outside of this group too (torch numbers groups by how many a rank has made), and be torn down while peers are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch.distributed as dist
from typing_extensions import override

from ..hosts import hosts_of
from .algorithm import AlgorithmUnavailable
from .exchange import NOTHING, Message, PlannedAllReduce, Step
from .ring import ring_steps

_CHAIN_NUMEL = 128 * 1024
"""Elements that a chain passes on at a time."""


@final
class HierarchicalAllReduce(PlannedAllReduce):
    """See the module. Construction blocks until all ranks have told their hosts, unless ``hosts`` are given.

    Args:
        hosts: Every rank's host, in rank order; the same on all ranks. By default :func:`hosts_of` the group.

    Raises:
        AlgorithmUnavailable: all ranks are on one host.
    """

    def __init__(self, group: dist.ProcessGroup, hosts: list[str] | None = None) -> None:
        super().__init__(group)
        hosts = hosts_of(group) if hosts is None else hosts
        if len(hosts) != self.world_size:
            raise ValueError(f"hosts must name the host of each of {self.world_size} ranks, got {len(hosts)}: {hosts}")
        if len(set(hosts)) == 1:
            raise AlgorithmUnavailable(
                "algorithm hierarchical cannot run here: all ranks are on one host; shared_memory and native would"
            )
        members = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in hosts}
        self._leaders = [ranks[0] for ranks in members.values()]
        self._neighbours = members[hosts[self.rank]]

    @override
    def plan(self, numel: int) -> list[Step]:
        steps = chain_steps(self._neighbours[::-1], self.rank, numel, adds=True)
        if self.rank in self._leaders:
            steps += ring_steps(self._leaders, self._leaders.index(self.rank), numel)
        return steps + chain_steps(self._neighbours, self.rank, numel, adds=False)


def chain_steps(ranks: Sequence[int], rank: int, numel: int, adds: bool) -> list[Step]:
    """Pass ``numel`` elements on from the first to the last of ``ranks``, as ``rank``, one of them, sees it."""
    position = ranks.index(rank)
    before = ranks[position - 1] if position > 0 else None
    after = ranks[position + 1] if position + 1 < len(ranks) else None
    parts = [(start, min(start + _CHAIN_NUMEL, numel)) for start in range(0, numel, _CHAIN_NUMEL)]

    def message(peer: int | None, number: int) -> Message:
        return Message(peer, *parts[number]) if peer is not None and 0 <= number < len(parts) else NOTHING

    return [
        Step(outgoing=message(after, number - 1), incoming=message(before, number), adds=adds)
        for number in range(len(parts) + 1)
    ]
