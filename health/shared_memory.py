"""``/dev/shm``, in which loader workers hand over batches, and what dead processes have left there and elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .check import Check, gib, plural
from .planned_run import PlannedRun

SHM = Path("/dev/shm")
_NCCL_BYTES = 32 * 2**20
"""Of a rank, where GPUs talk through the host's memory."""

# Folders as processes.py names them; files as torch does: https://github.com/pytorch/pytorch (NewProcessWideShmHandle)
_OURS = re.compile(r"^(?:gradsync-|torch_)(\d+)[-_]")


def check_shm(run: PlannedRun, folder: Path = SHM) -> Check:
    """Our own shared memory is anonymous and needs none of it; the loaders' batches do, and NCCL."""
    if not folder.is_dir():
        remedy = "--data.num_workers 0, or mount it: mount -t tmpfs tmpfs /dev/shm"
        return Check("/dev/shm", "FAIL" if run.num_workers else "warn", "there is none", remedy)
    usage = shutil.disk_usage(folder)
    least = run.devices * (_NCCL_BYTES if run.backend == "nccl" else 0)
    needed = least + run.loader_bytes
    least += run.devices * run.num_workers * run.batch_bytes  # one batch for each worker
    workers = plural(run.devices * run.num_workers, "loader worker")
    use = f"{workers} need up to {gib(needed)}" if needed else "no loader worker needs it"
    found = f"{gib(usage.free)} free of {gib(usage.total)}; {use}"
    values = {"free_bytes": usage.free, "total_bytes": usage.total, "needed_bytes": needed}
    if usage.free < needed:
        few = max(0, usage.free // max(1, run.loader_bytes // max(1, run.devices * run.num_workers)) // run.devices)
        remedy = f"--data.num_workers {few}, or make it larger: docker run --shm-size {_size(needed)}"
        return Check("/dev/shm", "FAIL" if usage.free < least else "warn", found, remedy, values)
    return Check("/dev/shm", "ok", found, values=values)


def _size(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**30)}g"


def check_leftovers(folders: Iterable[Path] | None = None) -> Check:
    """Only what bears the number of a dead process. Of folders, those that the start of a command could not remove."""
    places = {SHM, Path("/tmp"), Path(tempfile.gettempdir())} if folders is None else set(folders)
    left = sorted(path for place in places if place.is_dir() for path in place.iterdir() if _is_left(path.name))
    values = {"paths": [str(path) for path in left]}
    if not left:
        return Check("leftovers", "ok", "no shared memory and no folder of a dead process", values=values)
    num_bytes = sum(_size_of(path) for path in left)
    found = f"{len(left)} of dead processes, {gib(num_bytes)}: {', '.join(map(str, left[:3]))}"
    names = shlex.join(str(path) for path in left[:3])
    more = f" and {len(left) - 3} more (--json lists them)" if len(left) > 3 else ""
    return Check("leftovers", "warn", found, f"rm -r {names}{more}, unless another container uses it", values)


def _is_left(name: str) -> bool:
    found = _OURS.match(name)
    return bool(found) and not Path("/proc", found.group(1)).exists()


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else [Path(at, name) for at, _, names in os.walk(path) for name in names]
    return sum(file.stat().st_size for file in files if file.is_file())
