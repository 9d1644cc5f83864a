"""Memory that the processes of one host map together.

A segment has no name: it is an anonymous file (``memfd_create``), which the kernel frees with the last process that
maps it, whatever ends that process. It does not count against the size of /dev/shm, which is 64 MB in many containers.
"""

from __future__ import annotations

import mmap
import os
import secrets
from typing import Any, final

import torch
from torch import Tensor

from .room import available_bytes

_TOKEN_BYTES = 16
_BYTES_PER_MIB = 1024 * 1024


class SharedMemoryError(RuntimeError):
    """Memory cannot be shared here; the text says why."""


@final
class Segment:
    """A mapping of ``num_bytes`` bytes. Its first 16 bytes hold a token by which others recognise it."""

    HEADER_BYTES = 64

    def __init__(self, mapping: mmap.mmap, fd: int | None) -> None:
        self._fd = fd
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive as long as its views

    @classmethod
    def create(cls, num_bytes: int, num_makers: int = 1, instead: str = "algorithm native needs none") -> Segment:
        """All of it is allocated now: a page that is missing later would be a bus error.

        ``num_makers`` processes of this host do so at the same time: there must be room for all of them.
        ``instead`` says what to do where there is not.

        Raises:
            SharedMemoryError: there is not so much room.
        """
        num_bytes += cls.HEADER_BYTES
        fd = os.memfd_create("gradsync", os.MFD_CLOEXEC)
        try:
            if num_makers * num_bytes > (available := available_bytes()):
                have = f"{available // _BYTES_PER_MIB} MiB are available to {num_makers} ranks"
                raise SharedMemoryError(_too_little(num_bytes, have, instead))
            os.posix_fallocate(fd, 0, num_bytes)
            mapping = mmap.mmap(fd, num_bytes)
        except OSError as error:
            os.close(fd)
            raise SharedMemoryError(_too_little(num_bytes, error.strerror or str(error), instead)) from error
        except SharedMemoryError:
            os.close(fd)
            raise
        mapping[:_TOKEN_BYTES] = secrets.token_bytes(_TOKEN_BYTES)
        return cls(mapping, fd)

    def handle(self) -> dict[str, Any]:
        """By which another process attaches, until :meth:`seal`; JSON-compatible."""
        token = self._bytes[:_TOKEN_BYTES].numpy().tobytes().hex()
        return {"pid": os.getpid(), "fd": self._fd, "token": token}

    @classmethod
    def attach(cls, handle: dict[str, Any]) -> Segment:
        """Map the segment that another process of this user made.

        Raises:
            SharedMemoryError: it cannot be reached from here, as between containers.
        """
        try:
            fd = os.open(f"/proc/{handle['pid']}/fd/{handle['fd']}", os.O_RDWR | os.O_CLOEXEC)
            try:
                mapping = mmap.mmap(fd, 0)
            finally:
                os.close(fd)
        except OSError as error:
            raise SharedMemoryError(f"memory of process {handle['pid']} cannot be mapped: {error}") from error
        if mapping[:_TOKEN_BYTES].hex() != handle["token"]:
            raise SharedMemoryError(f"process {handle['pid']} is another one here: are the ranks in one container?")
        return cls(mapping, None)

    def seal(self) -> None:
        """Nobody else may attach from now on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def address(self) -> int:
        """Of the first byte behind the header."""
        return self._bytes.data_ptr() + self.HEADER_BYTES

    def tensor(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """1-D view of the ``numel`` elements from byte ``start`` behind the header."""
        start += self.HEADER_BYTES
        return self._bytes[start : start + numel * dtype.itemsize].view(dtype)


def _too_little(num_bytes: int, reason: str, instead: str) -> str:
    needed = f"{num_bytes / _BYTES_PER_MIB:.0f} MiB of shared memory are needed per rank"
    return f"{needed}: {reason}; {instead}"
