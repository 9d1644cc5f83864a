"""Writing a file so that a reader finds either the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def atomic_write_bytes(path: Path | str, content: bytes) -> None:
    """Replace `path` by `content` in one step; parent folders are made. On failure the old file stays as it was.

    Any process and thread may call it; blocks until the content is on disk. Raises: OSError, which names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same directory, because os.replace is atomic only within one file system. By the process's number
    # checkpoints/replacing.py knows what a killed one left; threads of one process may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{os.getpid()}.part")
    try:
        _write_through(temporary, content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # A full disk names no file, others the temporary one or both.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: Path | str, text: str) -> None:
    """:func:`atomic_write_bytes` of `text` in UTF-8; "?" for what that cannot hold, such as bytes in a file's name."""
    atomic_write_bytes(path, text.encode("utf-8", "replace"))


def atomic_write_json(path: Path | str, data: Any) -> None:
    """:func:`atomic_write_bytes` of `data` as JSON. A float that is not finite becomes null: JSON knows no NaN.

    Paths become strings, scalars of numpy and torch (anything with ``item()``) plain numbers.
    Raises: TypeError for any other object that JSON cannot hold, before anything is written.
    """
    atomic_write_text(path, json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
