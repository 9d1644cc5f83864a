"""Cores, memory, descriptors and what the kernel allows."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from ..comm.shared_memory.room import available_bytes, group_folders
from .check import GIB, Check, gib, plural
from .planned_run import PlannedRun

_BUSY_SHARE = 0.5
"""Of the cores: a load average above it is somebody else's work, and slows every step."""

_LEAST_BYTES = GIB
_BATCH_64_BYTES = 7 * GIB
"""Of a rank that trains ResNet50 at 224 pixels on the CPU: measured were 1.2 GiB at batch size 1, 6.5 GiB at 64."""

_DESCRIPTORS, _DESCRIPTORS_PER_WORKER = 128, 16
"""Of a rank, and for each loader worker (pipes, batches on their way); measured were 74 with two workers."""

_PR_GET_PDEATHSIG = 2


def num_cores() -> int:
    """Those that this process may use: of the machine, by its CPU affinity, and by a container's quota."""
    quota = cpu_quota()
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def check_cores(run: PlannedRun) -> Check:
    """Threads against cores. Without ``OMP_NUM_THREADS`` Lightning divides the cores among the ranks."""
    cores, asked = num_cores(), os.environ.get("OMP_NUM_THREADS")
    threads = int(asked) if asked and asked.isdigit() else max(1, (os.cpu_count() or 1) // run.devices)
    values = {"cores": cores, "ranks": run.devices, "threads_per_rank": threads, "load_1_min": os.getloadavg()[0]}
    told = "OMP_NUM_THREADS" if asked else "OMP_NUM_THREADS unset"
    found = f"{plural(cores, 'core')} for {plural(run.devices, 'rank')} x {plural(threads, 'thread')} ({told})"
    if run.accelerator == "cpu" and run.devices > cores:
        return Check(
            "cores", "warn", found, f"--trainer.devices {cores}: ranks that share a core wait in turns", values
        )
    if run.devices * threads > cores:
        best = max(1, cores // run.devices)
        return Check("cores", "warn", found, f"export OMP_NUM_THREADS={best}: threads that share cores wait", values)
    return Check("cores", "ok", found, values=values)


def check_load() -> Check:
    load, cores = os.getloadavg()[0], num_cores()
    found = f"average {load:.1f} over the last minute on {plural(cores, 'core')}"
    values = {"load_1_min": load, "cores": cores}
    if load > _BUSY_SHARE * cores:
        return Check("load", "warn", found, "end what else runs (`top`): it slows every step", values)
    return Check("load", "ok", found, values=values)


def check_memory(run: PlannedRun) -> Check:
    available = available_bytes()
    share = available / run.devices
    found = f"{gib(available)} available, {gib(share)} for each rank"
    values = {"available_bytes": available, "per_rank_bytes": int(share)}
    if share < _LEAST_BYTES:
        remedy = f"--trainer.devices {max(1, available // _LEAST_BYTES)}, or more memory: a rank needs 1 GiB at least"
        return Check("memory", "FAIL", found, remedy, values)
    if run.accelerator == "cpu" and share < _BATCH_64_BYTES:
        remedy = "ResNet50 at 224 pixels and batch size 64 needs 7 GiB: find one that fits, gradsync tune-batch-size"
        return Check("memory", "warn", found, remedy, values)
    return Check("memory", "ok", found, values=values)


def check_container() -> Check:
    """Limits of control groups, which most programs do not see: PyTorch counts the machine's cores."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, quota, cores = memory_limit(), cpu_quota(), os.cpu_count() or 1
    values = {"memory_limit_bytes": limit, "cpu_quota": quota, "machine_bytes": machine_bytes, "machine_cores": cores}
    told = []
    if limit is not None and limit < machine_bytes:
        told.append(f"{gib(limit)} of {gib(machine_bytes)} memory")
    if quota is None or quota >= cores:
        found = "; ".join(told) or "no limit below the machine's: " + f"{plural(cores, 'core')}, {gib(machine_bytes)}"
        return Check("container", "ok", found, values=values)
    found = "; ".join([f"{quota:g} of {plural(cores, 'core')}", *told])
    if os.environ.get("OMP_NUM_THREADS"):
        return Check("container", "ok", found, values=values)
    remedy = f"export OMP_NUM_THREADS: PyTorch sees {cores} cores; or raise the limit (docker run --cpus)"
    return Check("container", "warn", found, remedy, values)


def memory_limit() -> int | None:
    """Bytes that the control groups of this process allow; None without a limit."""
    limits = [_number(folder / name) for folder in group_folders() for name in ("memory.max", "memory.limit_in_bytes")]
    return min((int(limit) for limit in limits if limit is not None), default=None)


def cpu_quota() -> float | None:
    """Cores' worth of time that the control groups of this process allow; None without a limit."""
    quotas = []
    for folder in group_folders("cpu"):
        try:
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        except (OSError, ValueError):  # "max", or of the older kind
            quota, period = (_number(folder / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def check_descriptors(run: PlannedRun) -> Check:
    """``RLIMIT_NOFILE`` counts for each process alone; a rank holds its connections and its loader workers' pipes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _DESCRIPTORS + run.devices + _DESCRIPTORS_PER_WORKER * run.num_workers
    names = [str(limit) if limit != resource.RLIM_INFINITY else "unlimited" for limit in (soft, hard)]
    found = f"{names[0]} per process (hard limit {names[1]}), a rank needs {needed}"
    values = {"soft": soft, "hard": hard, "needed": needed}
    if soft != resource.RLIM_INFINITY and soft < needed:
        can = hard == resource.RLIM_INFINITY or hard >= needed
        remedy = f"ulimit -n {needed}" if can else f"ask for a limit of {needed} (LimitNOFILE, limits.conf, --ulimit)"
        return Check("open files", "FAIL", found, remedy, values)
    return Check("open files", "ok", found, values=values)


def check_kernel() -> Check:
    """Calls that some containers forbid: each is made."""
    calls = {"pidfd_open": _pidfd_works, "prctl": _prctl_works, "memfd_create": _memfd_works}
    works = {name: call() for name, call in calls.items()}
    missing = [name for name, does in works.items() if not does]
    found = f"{os.uname().release}: {', '.join(works)} work"
    if not missing:
        return Check("kernel", "ok", found, values=works)
    remedy = (
        "allow it in the container (seccomp profile): ranks need it for shared memory, and to end with their parent"
    )
    return Check("kernel", "FAIL", f"{' and '.join(missing)} cannot be called here", remedy, works)


def _pidfd_works() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _prctl_works() -> bool:
    number = ctypes.c_int()
    return ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(number)) == 0


def _memfd_works() -> bool:
    try:
        os.close(os.memfd_create("gradsync"))
    except OSError:
        return False
    return True
