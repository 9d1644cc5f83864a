"""Whether results and checkpoints can be written, and how fast; whether the images can be read."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from ..datamodules.decoding import UndecodableImage, decode
from ..datamodules.image_source import ImageSource
from ..datamodules.imagenet import DEFAULT_SHUFFLE_WINDOW
from ..datamodules.opening import open_data
from ..errors import UserError
from .check import MIB, RESNET50_BYTES, Check, gib
from .planned_run import PlannedRun

_CHECKPOINT_BYTES = 2 * RESNET50_BYTES  # parameters and momentum
_NUM_CHECKPOINTS = 4  # the three that `fit` keeps, and the one being written
_TRIAL_BYTES, _BLOCK_BYTES = 64 * MIB, 4 * MIB
_NUM_SYNCS = 10
_SLOW_MIB_PER_S, _SLOW_SYNC_MS = 20.0, 100.0
_MOST_IMAGES, _MOST_SECONDS = 64, 3.0


def check_output(run: PlannedRun) -> Check:
    """A file is written in ``--output`` and removed again, as are the folders that had to be made for it."""
    elsewhere = "name a folder elsewhere: --output DIR here, --run_dir DIR with gradsync fit"
    try:
        with _folder(run.output):
            free = shutil.disk_usage(run.output).free
            with _trial_file(run.output) as path:
                mib_per_s, sync_ms = _write(path), _sync_ms(path)
    except OSError as error:
        return Check("output", "FAIL", f"{run.output} cannot be written: {error.strerror}", elsewhere)
    found = f"{run.output}: {gib(free)} free, {mib_per_s:.0f} MiB/s to the disk, fsync {sync_ms:.1f} ms"
    values = {"free_bytes": free, "write_mib_per_s": mib_per_s, "fsync_ms": sync_ms}
    needed = _NUM_CHECKPOINTS * _CHECKPOINT_BYTES
    if free < needed:
        mark = "FAIL" if free < _CHECKPOINT_BYTES else "warn"
        return Check("output", mark, found, f"checkpoints of ResNet50 need {gib(needed)}: {elsewhere}", values)
    if mib_per_s < _SLOW_MIB_PER_S or sync_ms > _SLOW_SYNC_MS:
        remedy = "write checkpoints while training goes on: --async_checkpoints true; or another disk, --run_dir DIR"
        return Check("output", "warn", f"{found}: slow", remedy, values)
    return Check("output", "ok", found, values=values)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # a run may have begun to write there meanwhile
            for path in made:
                path.rmdir()


@contextmanager
def _trial_file(folder: Path) -> Iterator[Path]:
    # The name of a file that the next run's start removes, should this process be killed: checkpoints/replacing.py
    path = folder / f".doctor.{os.getpid()}.part"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path) -> float:
    """MiB/s until the disk has it all."""
    block = os.urandom(_BLOCK_BYTES)  # zeros might be compressed
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(_TRIAL_BYTES // _BLOCK_BYTES):
            if file.write(block) < _BLOCK_BYTES:  # the next one would say why
                file.write(block)
        os.fsync(file.fileno())
    return _TRIAL_BYTES / MIB / (time.perf_counter() - began)


def _sync_ms(path: Path) -> float:
    """Median of writing a small block through to the disk."""
    times = []
    with path.open("r+b", buffering=0) as file:
        for _ in range(_NUM_SYNCS):
            began = time.perf_counter()
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
            times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def check_data(run: PlannedRun) -> Check:
    """Some training images are read in an epoch's order, and decoded."""
    if run.data_dir is None:
        return Check("data", "ok", "none named (--data-dir DIR): the bundled demo images")
    try:
        opened = open_data(run.data_dir, DEFAULT_SHUFFLE_WINDOW, None)
        num_images, num_bytes, seconds, broken = _read(opened.train)
    except (UserError, OSError) as error:
        found = str(error).splitlines()[0]
        return Check("data", "FAIL", found, "correct --data-dir DIR; what it must hold: docs/data.md")
    mib_per_s = num_bytes / MIB / seconds
    found = (
        f"{opened.found}, {len(opened.train)} + {len(opened.val)} images, {len(opened.train.class_names)} classes; "
        f"{num_images} read with {mib_per_s:.0f} MiB/s, {num_images / seconds:.0f} images/s (the cache helps)"
    )
    values = {"images_read": num_images, "read_mib_per_s": mib_per_s, "undecodable": broken}
    if broken:
        remedy = "mend or remove them, or leave them out: --data.bad_samples skip"
        return Check("data", "warn", f"{found}; cannot be decoded: {', '.join(broken[:3])}", remedy, values)
    return Check("data", "ok", found, values=values)


def _read(source: ImageSource) -> tuple[int, int, float, list[str]]:
    """Number of images, of bytes, seconds of reading, and names of those that cannot be decoded."""
    order = source.order(torch.Generator().manual_seed(0))[:_MOST_IMAGES].tolist()
    num_images, num_bytes, seconds, broken = 0, 0, 0.0, []
    for index in order:
        began = time.perf_counter()
        content, _ = source.read(index)
        seconds += time.perf_counter() - began
        num_images, num_bytes = num_images + 1, num_bytes + len(content)
        try:
            decode(content)
        except UndecodableImage:
            broken.append(source.name(index))
        if seconds > _MOST_SECONDS:
            break
    return num_images, num_bytes, max(seconds, 1e-9), broken
