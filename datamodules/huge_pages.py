"""Memory for a batch on the CPU, in pages of 2 MiB where the kernel allows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE_BYTES = 4096


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As ``torch.empty``. glibc returns blocks beyond 32 MiB to the kernel, which then hands out every page anew: for a
    batch of 64 float images of 224 pixels, 9,400 page faults that take longer than normalizing it."""
    tensor = torch.empty(shape, dtype=dtype)
    first = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE_BYTES * _PAGE_BYTES
    if end > first and (madvise := getattr(ctypes.CDLL(None), "madvise", None)) is not None:
        # A hint: where it is refused, all works as without it.
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return tensor
