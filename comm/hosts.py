"""Which ranks share a machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch.distributed as dist

from .agreement import all_gather_bytes

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def host_identity() -> str:
    """Equal for two processes that run on one machine and see each other's process numbers.

    The host name alone will not do: containers of one machine may share it, or differ in it.
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
    namespace = os.readlink(_PID_NAMESPACE) if _PID_NAMESPACE.exists() else ""
    return f"{boot} {namespace}"


def hosts_of(group: dist.ProcessGroup) -> list[str]:
    """Every rank's host identity, in rank order. Blocks; called on all ranks of ``group``."""
    return [data.decode() for data in all_gather_bytes(host_identity().encode(), group)]
