"""Progressive resizing: small training images first, which are cheap, larger ones towards the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..errors import UserError

_MULTIPLE = 32


@final
@dataclass(frozen=True)
class ResolutionRamp:
    """From ``start_size`` up to ``--data.image_size`` on a straight line between two epochs, in multiples of 32 pixels.

    After Howard (https://www.fast.ai/posts/2018-08-10-fastai-diu-imagenet.html), as FFCV's ImageNet training does it
    (https://github.com/libffcv/ffcv-imagenet).

    Args:
        start_size: Pixels until ``start_epoch``.
        start_epoch: Last epoch at ``start_size``.
        end_epoch: First epoch at full size.
    """

    start_size: int
    start_epoch: int
    end_epoch: int

    def __post_init__(self) -> None:
        if self.start_size < 1:
            raise UserError(f"--data.resolution_ramp.start_size must be >= 1, got {self.start_size}")
        if not 0 <= self.start_epoch < self.end_epoch:
            raise UserError(
                "--data.resolution_ramp.start_epoch must be >= 0 and less than end_epoch,"
                f" got {self.start_epoch} and {self.end_epoch}"
            )

    def size_at(self, epoch: int, full_size: int) -> int:
        if epoch <= self.start_epoch:
            return self.start_size
        if epoch >= self.end_epoch:
            return full_size
        done = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        size = self.start_size + done * (full_size - self.start_size)
        return max(_MULTIPLE, round(size / _MULTIPLE) * _MULTIPLE)
