"""Where encoded images come from: the seam between storage formats and everything that is done with an image."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ImageSource(ABC):
    """The encoded images of one split, by index. Copies of it live in loader workers; none holds an open connection."""

    class_names: list[str]
    """A label is an index into it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """The file's content and its label. Blocks while storage is read.

        Raises:
            OSError: it cannot be read, after as many tries as make sense there.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person finds the image by."""

    def order(self, generator: torch.Generator) -> Tensor:
        """(len,) int64: every index once, shuffled as well as the storage can be read in that order."""
        return torch.randperm(len(self), generator=generator)
