"""``halving_doubling``: pairs of ranks exchange halves, halves of halves and so on; few steps, whatever the size.

Phases of every bucket; the core is the largest power of two of the ranks:

1. *fold in*: a rank beyond the core adds its bucket to that of a rank in it, and waits;
2. *reduce-scatter* (recursive halving): partners at distance 1, 2, 4 ... each sum one half of what both hold;
3. *all-gather* (recursive doubling): the same exchanges backwards, with complete sums;
4. *fold out*: the ranks beyond the core get the result.

Sources: Rabenseifner, "Optimization of collective reduction operations" (2004); Thakur, Rabenseifner and Gropp,
"Optimization of collective communication operations in MPICH" (2005).
"""

from __future__ import annotations

from typing import final

from typing_extensions import override

from .exchange import Message, PlannedAllReduce, Step


@final
class HalvingDoublingAllReduce(PlannedAllReduce):
    """See the module.

    For a power of two it sends what a ring sends, in 2 log2(n) steps instead of 2 (n-1): best for small buckets.
    For other sizes some ranks move the whole bucket once more each way: a ring is then better for large ones.
    """

    @override
    def plan(self, numel: int) -> list[Step]:
        return folded_steps(self.rank, self.world_size, numel)


def folded_steps(rank: int, world_size: int, numel: int) -> list[Step]:
    """All-reduce of ``numel`` elements between any number of ranks, as ``rank`` sees it."""
    core = 1 << (world_size.bit_length() - 1)
    if rank >= core:
        whole = Message(rank - core, 0, numel)
        return [Step(outgoing=whole, adds=True), Step(incoming=whole, adds=False)]
    steps = halving_doubling_steps(rank, core, numel)
    if rank + core < world_size:
        whole = Message(rank + core, 0, numel)
        return [Step(incoming=whole, adds=True), *steps, Step(outgoing=whole, adds=False)]
    return steps


def halving_doubling_steps(rank: int, world_size: int, numel: int) -> list[Step]:
    """All-reduce of ``numel`` elements between ``world_size`` ranks, a power of two, as ``rank`` sees it.

    Near partners come first: the most data then goes between ranks that are likely to share a host.
    """
    halving, doubling = [], []
    start, end = 0, numel
    distance = 1
    while distance < world_size:
        peer = rank ^ distance
        middle = (start + end) // 2
        lower, upper = Message(peer, start, middle), Message(peer, middle, end)
        kept, given = (lower, upper) if rank < peer else (upper, lower)
        halving.append(Step(outgoing=given, incoming=kept, adds=True))
        doubling.append(Step(outgoing=kept, incoming=given, adds=False))
        start, end = kept.start, kept.end
        distance *= 2
    return halving + doubling[::-1]
