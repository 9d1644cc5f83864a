"""The seam for gradients and parameters that do not go through the socket: see :mod:`.naive`, :mod:`.collective`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..buckets import Bucket

Watch = Callable[[], None]
"""Called a few times per second while a method waits for peers; raises if one of them is known to have ended."""


class ExchangeFailed(Exception):
    """A peer is lost or too late. Whose fault it is, the server's watch may know a moment later."""


class Peers(Protocol):
    """The server and all workers, who move whole steps among themselves, in sync mode.

    Every method blocks, and is called by its side once per step, with the buckets of one optimizer. Buckets that some
    worker, or even all of them, have no gradient for travel as zeros.

    Raises:
        ExchangeFailed: a peer is lost, where the backend can tell.
    """

    def push_pull(self, buckets: list[Bucket], watch: Watch) -> int:
        """Worker: hand over the gradients, take over the parameters in place; returns the bytes."""
        ...

    def collect(self, buckets: list[Bucket], watch: Watch) -> int:
        """Server: average all workers' gradients into ``buckets``; returns the bytes."""
        ...

    def distribute(self, buckets: list[Bucket], watch: Watch) -> int:
        """Server: give the parameters in ``buckets`` to all workers; returns the bytes."""
        ...

    def abort(self) -> None:
        """Give up what is under way, on a failure: or this process would wait for its peers when it exits."""
        ...
