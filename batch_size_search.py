"""Which batch size to try next: doubling while it fits, then bisection. Knows nothing of what a trial is."""

from __future__ import annotations

from typing import final

_FINENESS = 8
"""Bisection ends when the next size would be larger by less than an eighth."""


@final
class BatchSizeSearch:
    """Looks for the largest size that fits, assuming that all smaller ones do.

    Args:
        first: Size to begin with.
        most: Largest size to try.
    """

    def __init__(self, first: int, most: int) -> None:
        self._next = min(first, most)
        self._most = most
        self.largest_that_fits = 0
        self.smallest_that_does_not: int | None = None

    def next(self) -> int | None:
        """The size to try, None when there is nothing more to find out."""
        low, high = self.largest_that_fits, self.smallest_that_does_not
        if high is not None:
            return (low + high) // 2 if high - low > max(1, low // _FINENESS) else None
        return self._next if low < self._most else None

    def tell(self, size: int, fits: bool) -> None:
        """What became of a trial of the size that :meth:`next` gave."""
        if fits:
            self.largest_that_fits = max(self.largest_that_fits, size)
            self._next = min(2 * size, self._most)
        else:
            self.smallest_that_does_not = min(size, self.smallest_that_does_not or size)

    def limit(self, most: int) -> None:
        """No size beyond this makes sense, as a trial of a larger one has shown."""
        self._most = most
        self._next = min(self._next, most)

    def trials_left(self) -> int:
        """At most so many, if everything fits or nothing does."""
        low, high = self.largest_that_fits, self.smallest_that_does_not
        if high is None:
            doublings = max(0, (self._most - 1) // (low or self._next)).bit_length()
            return doublings if low else 1 + max(doublings, (self._next - 1).bit_length())
        return max(0, (high - low) // max(1, low // _FINENESS) - 1).bit_length()
