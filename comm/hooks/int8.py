"""Quantization to 8 bits: each block of a gradient as whole multiples, -127 to 127, of its own scale.

The phases are those of :mod:`.compression`: *correct*, *compress*, *gather*, *average*.

Stochastic rounding with a scale per block: Alistarh et al., "QSGD" (2017). Error feedback: see :mod:`.compression`.
"""

# No `from __future__ import annotations`: DDP's register_comm_hook compares the hook's annotations with the types.
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from .compression import CompressionState, average_messages

_ZERO = 128  # the byte that stands for 0; unsigned ones are rounded down by truncation
_STEP = 2.0**-16  # of the random numbers, which have 16 bits
_WIDER = 1 + 2.0**-20  # else the largest element could round to 128, whose byte is that of -128
_SMALLEST_SCALE = 2.0**-110  # `_STEP` times it is still a normal float32


@final
class Int8State(CompressionState):
    """For :func:`int8_hook`; :class:`.compression.CompressionState` describes the other options.

    Args:
        block_size: Elements that share a scale. A bucket's last block may be shorter.
        seed: Of the stochastic rounding, in [0, 2**32); every rank draws numbers of its own.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        block_size: int = 256,
        error_feedback: bool = True,
        seed: int = 0,
        named_parameters: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {block_size}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be >= 0 and < 2**32, got {seed}")
        super().__init__(process_group, error_feedback, named_parameters)
        self.block_size = block_size
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._loaded_generator: Tensor | None = None

    def num_blocks(self, gradient: Tensor) -> int:
        return -(-gradient.numel() // self.block_size)

    @override
    def message_bytes(self, gradient: Tensor) -> int:
        # in whole float32, so that each rank's scales lie aligned among all
        return 4 * (self.num_blocks(gradient) + -(-gradient.numel() // 4))

    def generator(self, device: torch.device) -> torch.Generator:
        """This rank's random numbers, on the device of the first bucket."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            # torch's generator of the CPU uses 32 bits of its seed
            self._generator.manual_seed(int(np.random.SeedSequence((self.seed, self.rank)).generate_state(1)[0]))
            if self._loaded_generator is not None:
                self._generator.set_state(self._loaded_generator)
        return self._generator

    @override
    def state_dict(self) -> dict[str, Any]:
        generator = self._loaded_generator if self._generator is None else self._generator.get_state()
        return super().state_dict() | ({} if generator is None else {"generator": generator})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._generator = None
        loaded = state_dict.get("generator")
        self._loaded_generator = None if loaded is None else loaded.cpu()


def int8_hook(state: Int8State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the quantized gradients; DistributedDataParallel calls it for every bucket of a backward pass.

    A message holds a scale (float32) for each block, ``max(|x|) / 127``, and a byte for each element: the multiple
    of the scale below or above it, at random so that the expectation is the element (to 2**-16 of the scale).
    What is sent thus differs from the element by less than the scale, which is widened by 2**-20 and at least 2**-110.
    ``gradient + old error == sent + new error`` to one rounding in the working dtype (float64 for float64, else
    float32), which is at most the scale times that dtype's epsilon.

    A block with a value that is not finite (for float64: whose scale is not finite in float32) is not finite in any
    element of the average, and leaves no error, so that a run which skips the step can go on.

    The future holds ``bucket.buffer()``, averaged in place.
    """
    gradient = bucket.buffer()
    corrected = state.correct(bucket)
    message = torch.empty(state.message_bytes(gradient), dtype=torch.uint8, device=gradient.device)
    scales, levels = _parts(message, state.num_blocks(gradient), gradient.numel())
    scratch = torch.empty_like(corrected)  # one for all: fresh memory costs more than a pass over used one
    _quantize(state, corrected, scales, levels, scratch)
    if state.error_feedback:
        _add_levels(corrected, levels, -scales, state.block_size, scratch)
        corrected.nan_to_num_(0.0, 0.0, 0.0)
    num_blocks, block_size, world_size = state.num_blocks(gradient), state.block_size, state.world_size

    def add_all(total: Tensor, messages: Tensor) -> None:
        scratch = torch.empty_like(total)  # not the one above, which is another stream's on a GPU
        for scales, levels in (_parts(message, num_blocks, total.numel()) for message in messages):
            _add_levels(total, levels, scales / world_size, block_size, scratch)

    return average_messages(state, gradient, message, add_all)


def _parts(message: Tensor, num_blocks: int, numel: int) -> tuple[Tensor, Tensor]:
    """Views of the message: float32 scales ``(num_blocks,)`` and uint8 levels ``(numel,)``."""
    return message[: 4 * num_blocks].view(torch.float32), message[4 * num_blocks :][:numel]


def _quantize(state: Int8State, values: Tensor, scales: Tensor, levels: Tensor, scratch: Tensor) -> None:
    """Write into ``scales`` and ``levels`` what ``values`` is. ``scratch`` is like ``values``."""
    for scale, block, magnitude in _in_blocks(state.block_size, scales, values, scratch):
        largest = torch.abs(block, out=magnitude).amax(1, keepdim=True)
        scale.copy_(largest.mul_(_WIDER / 127).clamp_(min=_SMALLEST_SCALE))
    # Four numbers of 16 bits from each draw take a third of the time of as many uniform floats.
    random = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    random.random_(-(2**63), None, generator=state.generator(values.device))
    scratch.copy_(random.view(torch.int16)[: values.numel()])
    for scale, block, rounded in _in_blocks(state.block_size, scales, values, scratch):
        rounded.addcdiv_(block, scale.to(block.dtype) * _STEP)
    # the random numbers were in [-0.5, 0.5), in steps
    levels.copy_(scratch.mul_(_STEP).add_(_ZERO + 0.5))


def _add_levels(total: Tensor, levels: Tensor, scales: Tensor, block_size: int, scratch: Tensor) -> None:
    """Add to ``total`` the multiples of ``scales``. ``scratch`` is like ``total``."""
    scratch.copy_(levels).sub_(_ZERO)
    for scale, total_block, multiples in _in_blocks(block_size, scales.to(total.dtype), total, scratch):
        total_block.addcmul_(multiples, scale)


def _in_blocks(block_size: int, scales: Tensor, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the whole blocks, one a row, then of the shorter last one: a column of ``scales``, and each ``flat``."""
    num_whole = flat[0].numel() // block_size
    end = num_whole * block_size
    if num_whole:
        yield scales[:num_whole, None], *(tensor[:end].view(num_whole, block_size) for tensor in flat)
    if end < flat[0].numel():
        yield scales[num_whole:, None], *(tensor[end:].view(1, -1) for tensor in flat)
