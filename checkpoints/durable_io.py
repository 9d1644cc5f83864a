"""Checkpoints that survive: one is either whole under its name or not there, and a damaged one is not loaded.

Saving goes in four phases, and a kill between any two of them leaves a good checkpoint under the name:

1. *written*: the content is in a temporary file in the same folder, on the disk;
2. *announced*: the manifest ``NAME.sha256`` lists the digest of the new content beside that of the old;
3. *renamed*: the new content has the name;
4. *settled*: the manifest lists the new content alone, as ``sha256sum --check`` reads it.
"""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ..errors import UserError
from .manifest import Manifest, digest_of
from .replacing import remove_leftovers, replacing

_FULL = (errno.ENOSPC, errno.EDQUOT)


@final
class DurableCheckpointIO(CheckpointIO):
    """In place of Lightning's default, under every strategy: ``Trainer(plugins=[DurableCheckpointIO()])``.

    A disk that is full costs the checkpoint, with a warning, and not the run: the earlier ones are kept until a later
    one is whole. Paths that are no local files (``s3://``) go through Lightning's own.

    Args:
        falls_back: Load the newest good checkpoint of the same folder in place of a damaged one, with a warning;
            without it a damaged one is an error.
    """

    def __init__(self, falls_back: bool = False) -> None:
        self._falls_back = falls_back
        self._remote = TorchCheckpointIO()
        self._not_removed: list[Path] = []
        self._last_save_failed = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Called on the rank that saves; blocks until all is on the disk.

        Raises:
            OSError: it cannot be written, for another reason than a full disk.
        """
        if not is_local(path):
            self._remote.save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        try:
            _save(checkpoint, target)
        except (OSError, RuntimeError) as error:
            if not _is_full_disk(error):
                raise
            self._last_save_failed = True
            rank_zero_warn(f"no space left: checkpoint {target} was not saved, earlier ones are kept")
            return
        self._last_save_failed = False
        for earlier in self._not_removed:
            _remove(earlier)
        self._not_removed.clear()

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Called on all ranks.

        Raises:
            UserError: the file is damaged (and no other in its folder is good, if that would do).
            FileNotFoundError: there is none.
        """
        if is_local(path):
            path = self.good(Path(path))
        return self._remote.load_checkpoint(path, map_location, weights_only)

    def good(self, path: Path) -> Path:
        """``path`` if it is not damaged, or what is loaded in its place. Raises: UserError, as when loading."""
        if not path.is_file() or (damage := _damage(path)) is None:
            return path
        if not self._falls_back:
            raise UserError(f"checkpoint {path} is damaged ({damage}): name another one with --ckpt_path")
        for other in _newest_first(path):
            if _damage(other) is None:
                rank_zero_warn(f"checkpoint {path} is damaged ({damage}): going on from {other}")
                return other
        raise UserError(f"checkpoint {path} is damaged ({damage}), and no other in {path.parent} is good")

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Later, if what was to replace it could not be saved."""
        if not is_local(path):
            self._remote.remove_checkpoint(path)
        elif self._last_save_failed:
            self._not_removed.append(Path(path))
        else:
            _remove(Path(path))


def is_local(path: str | Path) -> bool:
    """Whether it is no address of a storage (``s3://``)."""
    return "file" in (protocol if isinstance(protocol := get_filesystem(path).protocol, tuple) else (protocol,))


def _save(checkpoint: dict[str, Any], target: Path) -> None:
    manifest = Manifest(target)
    with replacing(target, lambda file: torch.save(checkpoint, file)) as written:
        digest = digest_of(written)
        manifest.write([digest, *manifest.digests()])
    manifest.write([digest])


def _is_full_disk(error: BaseException | None) -> bool:
    """Also under the errors that torch puts on top: it closes its archive in the middle of the first one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__context__
    return False


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    Manifest(path).path.unlink(missing_ok=True)


def _damage(path: Path) -> str | None:
    """What is wrong with the content; without a manifest the archive's own checksums have to tell."""
    manifest = Manifest(path)
    if digests := manifest.digests():
        return None if digest_of(path) in digests else f"its content is not the one in {manifest.path.name}"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return f"the part {bad} has another checksum" if bad else None


def _newest_first(path: Path) -> Iterator[Path]:
    others = [other for other in path.parent.glob(f"*{path.suffix}") if other != path]
    yield from sorted(others, key=lambda other: (other.stat().st_mtime_ns, other.name), reverse=True)
