"""NVIDIA GPUs as PyTorch sees them. Asked in a child process: CUDA survives no fork, and a broken driver may hang."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import torch.cuda.nccl

from .check import GIB, Check, plural
from .child import Message, ask_in_child
from .planned_run import PlannedRun

_PATIENCE_S = 60.0
_DRIVER = Path("/proc/driver/nvidia")
_MOSTLY_FREE = 0.9


@final
@dataclass(frozen=True)
class Gpus:
    """``devices``: name, total and free bytes of each; ``peers``: whether GPU i reaches GPU j's memory."""

    devices: list[dict[str, Any]] = field(default_factory=list)
    peers: list[list[bool]] = field(default_factory=list)
    nccl: str | None = None
    driver: str | None = None
    problem: str | None = None

    def __len__(self) -> int:
        return len(self.devices)


def find_gpus() -> Gpus:
    """Blocks for at most a minute."""
    answer = ask_in_child(_ask, _PATIENCE_S)
    problem = answer.get("error")
    return Gpus(driver=_driver(), problem=problem) if problem else Gpus(**answer, driver=_driver())


def _ask() -> Message:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": torch.cuda.get_device_name(index), "total_bytes": total, "free_bytes": free})
    peers = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if count and torch.distributed.is_nccl_available() else None
    return {"devices": devices, "peers": peers, "nccl": nccl}


def _driver() -> str | None:
    """Its version; None where there is none."""
    with contextlib.suppress(OSError):
        words = (_DRIVER / "version").read_text().splitlines()[0].split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


def gpu_checks(run: PlannedRun, gpus: Gpus) -> list[Check]:
    """One line without GPUs; GPUs, topology and NCCL with them."""
    if not gpus:
        return [_none(run, gpus)]
    return [_memory(run, gpus), *([_topology(gpus)] if len(gpus) > 1 else []), _nccl(run, gpus)]


def _none(run: PlannedRun, gpus: Gpus) -> Check:
    values = {"count": 0, "driver": gpus.driver, "problem": gpus.problem}
    mark = "FAIL" if run.accelerator == "gpu" else "warn"
    if gpus.problem:
        found = f"PyTorch could not look for them: {gpus.problem}"
        return Check("GPUs", mark, found, "see whether `nvidia-smi` answers, and what it says", values)
    if gpus.driver:
        remedy = f"install a PyTorch for this driver, see https://pytorch.org; this one is {torch.__version__}"
        return Check("GPUs", mark, f"driver {gpus.driver}, but PyTorch sees no GPU", remedy, values)
    if run.accelerator == "gpu":
        return Check("GPUs", "FAIL", "PyTorch sees none", "--accelerator cpu, or start on a host with GPUs", values)
    return Check("GPUs", "ok", "none: ranks run on the CPU", values=values)


def _memory(run: PlannedRun, gpus: Gpus) -> Check:
    names = ", ".join(sorted({device["name"] for device in gpus.devices}))
    free, total = (min(device[f"{what}_bytes"] for device in gpus.devices) for what in ("free", "total"))
    found = f"{len(gpus)} x {names}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, driver {gpus.driver}"
    values = {"count": len(gpus), "driver": gpus.driver, "devices": gpus.devices}
    if run.accelerator == "gpu" and run.devices > len(gpus):
        remedy = f"--devices {len(gpus)}: NCCL takes one rank for each GPU"
        return Check("GPUs", "FAIL", f"{found}; {run.devices} ranks are asked for", remedy, values)
    if free < _MOSTLY_FREE * total:
        busy = [i for i, d in enumerate(gpus.devices) if d["free_bytes"] < _MOSTLY_FREE * d["total_bytes"]]
        remedy = f"look at `nvidia-smi`: another process holds memory of {plural(len(busy), 'GPU')} ({busy[0]} first)"
        return Check("GPUs", "warn", found, remedy, values)
    return Check("GPUs", "ok", found, values=values)


def _topology(gpus: Gpus) -> Check:
    count = len(gpus)
    apart = [f"{i}-{j}" for i in range(count) for j in range(i + 1, count) if not gpus.peers[i][j]]
    values = {"peers": gpus.peers}
    if apart:
        few = ", ".join(apart[:4])
        found = f"{plural(len(apart), 'pair')} of GPUs cannot reach each other's memory: {few}"
        return Check("topology", "warn", found, "see `nvidia-smi topo -m`: NCCL copies through the host there", values)
    return Check("topology", "ok", f"all {count} GPUs reach each other's memory", values=values)


def _nccl(run: PlannedRun, gpus: Gpus) -> Check:
    if gpus.nccl is None:
        mark = "FAIL" if run.accelerator == "gpu" else "warn"
        return Check("NCCL", mark, "this PyTorch has none", "install one built for CUDA, see https://pytorch.org")
    return Check("NCCL", "ok", f"version {gpus.nccl}", values={"version": gpus.nccl})
