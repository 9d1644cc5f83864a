"""Parameters of a worker that lie in the server's own memory: nothing is copied after a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..buckets import Bucket, apart, view_like


@final
class InPlace:
    """Lets the parameters of ``buckets`` live in their buffers, which the server steps.

    Sound in sync mode only: the server steps a bucket when all workers have pushed it, so nobody's backward pass
    reads it any more, and a worker goes on when all of the step is done. What a worker writes, all see.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._homes: list[list[tuple[Tensor, Tensor]]] = []
        self.extend(buckets)

    def extend(self, buckets: Sequence[Bucket]) -> None:
        """The same for further buckets."""
        for bucket in buckets:
            pairs = zip(bucket.parameters(), bucket.slices, strict=True)
            self._homes.append([(p, view_like(apart(flat), p)) for p, flat in pairs])
            self.take_over(len(self._homes) - 1)

    def take_over(self, bucket_index: int) -> None:
        """The server has stepped the bucket. Parameters that someone has given other memory since return to it."""
        for parameter, home in self._homes[bucket_index]:
            if parameter.data_ptr() != home.data_ptr():
                parameter.data = home
            torch.autograd.graph.increment_version(parameter)  # a backward pass through older values is an error

    @torch.no_grad()
    def release(self) -> None:
        """Give the parameters memory of their own again, with the values of now."""
        for parameter, home in (pair for pairs in self._homes for pair in pairs):
            if parameter.data_ptr() == home.data_ptr():
                parameter.data = home.clone()
        self._homes = []
