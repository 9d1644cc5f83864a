"""Top-k sparsification: each rank sends the largest elements of its gradient, and the rest with the next ones.

The phases are those of :mod:`.compression`: *correct*, *compress*, *gather*, *average*.

Sources: Aji and Heafield, "Sparse communication for distributed gradient descent" (2017); Lin et al., "Deep gradient
compression" (2018).
"""

# No `from __future__ import annotations`: DDP's register_comm_hook compares the hook's annotations with the types.
from collections.abc import Iterable
from math import ceil
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from .compression import CompressionState, average_messages

_SAMPLE_STRIDE = 97  # no power of two, nor a usual width of a layer: the sample must not be one column of a matrix
_SAMPLED_FROM = 2**16  # fewer elements are sorted out in less time than a sample saves


@final
class TopKState(CompressionState):
    """For :func:`top_k_hook`; :class:`CompressionState` describes the other options.

    Args:
        share: Of a bucket's elements, how many are sent, in (0, 1]; at least one is.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        share: float = 0.01,
        error_feedback: bool = True,
        named_parameters: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"share must be > 0 and <= 1, got {share}")
        super().__init__(process_group, error_feedback, named_parameters)
        self.share = share

    def num_sent(self, gradient: Tensor) -> int:
        """How many elements of ``gradient`` are sent."""
        return min(gradient.numel(), max(1, round(self.share * gradient.numel())))

    @override
    def message_bytes(self, gradient: Tensor) -> int:
        num_bytes = self.num_sent(gradient) * (4 + gradient.element_size())
        return -(-num_bytes // 8) * 8  # so that each rank's message lies aligned among all


def top_k_hook(state: TopKState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the elements of largest magnitude; DistributedDataParallel calls it for every bucket of a backward pass.

    A message holds, for each element sent, its index (int32) and its value (the gradient's dtype). Values that are
    not finite are the largest: they are sent first, and not kept as errors, so that a run which skips the step can
    go on. For finite ones ``gradient + old error == sent + new error`` exactly, the left sum being rounded to the
    working dtype (float64 for float64, else float32).

    The future holds ``bucket.buffer()``, averaged in place.
    """
    gradient = bucket.buffer()
    if gradient.numel() >= 2**31:
        raise ValueError(f"top-k takes buckets of less than 2**31 elements, got {gradient.numel()}: lower their size")
    corrected = state.correct(bucket)
    chosen = largest(corrected.abs(), state.num_sent(gradient))
    message = torch.empty(state.message_bytes(gradient), dtype=torch.uint8, device=gradient.device)
    num_sent, dtype, world_size = chosen.numel(), gradient.dtype, state.world_size
    values, indices = _parts(message, num_sent, dtype)
    indices.copy_(chosen)
    values.copy_(corrected[chosen])
    if state.error_feedback:
        corrected.index_add_(0, chosen, values.to(corrected.dtype), alpha=-1)
        corrected.nan_to_num_(0.0, 0.0, 0.0)

    def add_all(total: Tensor, messages: Tensor) -> None:
        for values, indices in (_parts(message, num_sent, dtype) for message in messages):
            total.index_add_(0, indices, values.to(total.dtype).div(world_size))

    return average_messages(state, gradient, message, add_all)


def _parts(message: Tensor, num_sent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of the message: values of ``dtype`` and int32 indices, both of shape ``(num_sent,)``."""
    values_at, indices_at = 0, dtype.itemsize * num_sent
    if dtype.itemsize < 4:  # the wider elements lie first, where they are aligned
        values_at, indices_at = 4 * num_sent, 0
    values = message[values_at:][: dtype.itemsize * num_sent].view(dtype)
    return values, message[indices_at:][: 4 * num_sent].view(torch.int32)


def largest(magnitude: Tensor, k: int) -> Tensor:
    """Indices (int64, in no order) of the ``k`` largest elements of a 1-D tensor; nan is larger than all.

    Exact. Off the GPU a sample first gives a threshold that a few more than ``k`` should reach, and the choice is
    among those: ``topk`` alone took ten times as long for 6.5 million elements and a share of 1 %.
    """
    if magnitude.is_cuda or magnitude.numel() < _SAMPLED_FROM or 4 * k > magnitude.numel():
        return magnitude.topk(k, sorted=False).indices
    sample = magnitude[::_SAMPLE_STRIDE]
    threshold = sample.topk(min(sample.numel(), ceil(1.2 * k / _SAMPLE_STRIDE) + 8)).values[-1]
    candidates = (magnitude < threshold).logical_not_().nonzero().squeeze(1)  # nan is among them
    if candidates.numel() < k:
        return magnitude.topk(k, sorted=False).indices
    return candidates[magnitude[candidates].topk(k, sorted=False).indices]
