"""Files below a root that fsspec knows: a local folder, ``s3://``, ``gs://``, ``hf://`` and what else is installed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError

T = TypeVar("T")

NUM_TRIES = 5
_FIRST_PAUSE_S = 0.5
# Under which S3, Google, Azure and Hugging Face tell one version of a file from another.
_VERSION = ("ETag", "etag", "md5Hash", "blob_id")
# Trying again would not change the answer.
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError)


@final
class Storage:
    """One root. Holds no connection, so copies of it work in forked and in spawned processes.

    Args:
        root: A folder or URL.
        cache_dir: Folder for whole copies of remote files; each is fetched once, whatever the number of processes.
    """

    def __init__(self, root: str, cache_dir: Path | None = None) -> None:
        self.root = root.rstrip("/")
        self._cache_dir = cache_dir
        try:
            self.is_local = isinstance(self._filesystem(), LocalFileSystem)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise UserError(f"--data.root {root}: {error}") from error

    def _filesystem(self) -> Any:
        # Asked for each time: fsspec keeps one instance for each process, and none survives a fork.
        return fsspec.core.url_to_fs(self.root)[0]

    def find(self, suffix: str, max_depth: int) -> list[str]:
        """Paths of files, sorted, at most so many folders below the root; none if there is no root."""

        def find() -> list[str]:
            filesystem, root = fsspec.core.url_to_fs(self.root)
            filesystem.invalidate_cache()
            return sorted(path for path in filesystem.find(root, maxdepth=max_depth) if path.endswith(suffix))

        return self.retried(find, self.root)

    def read(self, path: str, action: Callable[[Any], T]) -> T:
        """Call ``action`` with something pyarrow can read: a local path or an open file. Blocks; tries again."""
        if self.is_local:
            return action(path)
        if self._cache_dir is not None:
            return action(str(self._local_copy(path, self._cache_dir)))

        def read() -> T:
            # No read-ahead: row groups are read in random order, each at once.
            with self._filesystem().open(path, cache_type="none") as file:
                return action(file)

        return self.retried(read, path)

    def _local_copy(self, path: str, folder: Path) -> Path:
        """Complete on return; named after what the storage says of the file's version."""

        def version() -> str:
            info = self._filesystem().info(path)
            # Not fsspec's ukey(): it covers all that is known of a file, which depends on what was asked before.
            told = [info["size"], *(info[name] for name in _VERSION if name in info)]
            return hashlib.sha256(f"{self.root} {path} {told}".encode()).hexdigest()

        copy = folder / f"{self.retried(version, path)[:16]}-{Path(path).name}"
        if copy.exists():
            return copy
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f".{copy.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of which the kernel lets go if this process dies
                if not copy.exists():  # another process may have fetched it meanwhile
                    part = folder / f".{copy.name}.part"
                    self.retried(lambda: self._filesystem().get_file(path, str(part)), path)
                    os.replace(part, copy)
        except OSError as error:
            raise UserError(f"--data.cache_dir {folder} cannot take a copy of {path}: {error}") from error
        return copy

    def retried(self, action: Callable[[], T], path: str) -> T:
        """The action's result, at the latest try.

        Raises:
            UserError: it failed so often, or will not succeed.
        """
        pause = _FIRST_PAUSE_S
        for attempt in range(1, NUM_TRIES + 1):
            try:
                return action()
            except UserError:
                raise
            except _FINAL as error:
                raise UserError(f"--data.root {self.root}: {path}: {_told(error)}") from error
            except Exception as error:  # every protocol's library has its own exceptions
                if attempt == NUM_TRIES:
                    raise UserError(
                        f"--data.root {self.root}: {path} cannot be read, after {NUM_TRIES} tries: {_told(error)}"
                    ) from error
                print(
                    f"gradsync: {path}: {_told(error)}; trying again ({attempt} of {NUM_TRIES} tries)",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(pause)
            pause *= 2
        raise AssertionError


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
