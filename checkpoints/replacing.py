"""Giving a file a new content in two steps, with time for something in between; see also ``report/files.py``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LEFTOVER = re.compile(r"^\..*\.(\d+)\.part$")


@contextmanager
def replacing(target: Path, write: Callable[[IO[bytes]], object]) -> Iterator[Path]:
    """Enter with the new content on the disk, in a file beside ``target``; on leaving it becomes ``target``.

    Blocks until content and name are on the disk. After an error, inside too, ``target`` is as before.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """What processes left in it that were killed while they wrote."""
    for part in folder.glob(".*.part"):
        if (found := _LEFTOVER.match(part.name)) and not Path("/proc", found.group(1)).exists():
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
