"""Unpack the bundled demo images into an ImageNet tree in the user's cache folder.

The tree is complete or absent: it is built beside its final place and renamed, under a lock between processes.
A manifest written with it tells later starts whether a file has gone or changed, and then the tree is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError

BUNDLED_NAME = "Fashion-MNIST subset"
_ARCHIVE = Path(__file__).parent / "bundled" / "fashion_mnist_subset.npz"
_MANIFEST = "manifest.json"


def bundled_image_tree() -> Path:
    """Folder with ``train/<class>/*.png`` and ``val/<class>/*.png``, complete on return.

    Any number of processes may call this at once, on any rank; it blocks while another one is unpacking.

    Raises:
        UserError: the cache folder cannot be written.
    """
    # Named after the content: another version of the images gets another folder.
    name = f"fashion-mnist-{hashlib.sha256(_ARCHIVE.read_bytes()).hexdigest()[:12]}"
    tree = cache_folder() / name
    if is_complete(tree):
        return tree
    try:
        tree.parent.mkdir(parents=True, exist_ok=True)
        with _lock(tree.with_name(f".{name}.lock")):
            if not is_complete(tree):  # another process may have unpacked while this one waited
                _rebuild(tree)
    except OSError as error:
        raise UserError(
            f"cannot unpack the bundled images into {tree}: {error}\n"
            "Name a writable folder in the environment variable GRADSYNC_CACHE, or your own images with --data.root."
        ) from error
    return tree


def cache_folder() -> Path:
    """``$GRADSYNC_CACHE``, else ``gradsync`` in the XDG cache folder."""
    if own := os.environ.get("GRADSYNC_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "gradsync"


def is_complete(tree: Path) -> bool:
    """True if the tree holds exactly the images that its manifest lists, with the sizes it lists."""
    try:
        manifest = json.loads((tree / _MANIFEST).read_text())
        found = {str(path.relative_to(tree)): path.stat().st_size for path in tree.glob("*/*/*")}
    except (OSError, ValueError):
        return False
    return found == manifest


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file lock; the kernel releases it if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rebuild(tree: Path) -> None:
    """Put a fresh tree in place of whatever is there. The caller holds the lock."""
    for leftover in tree.parent.glob(f".{tree.name}.unpacking-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{tree.name}.unpacking-", dir=tree.parent, ignore_cleanup_errors=True
    ) as folder:
        fresh = Path(folder) / "tree"
        _write_tree(fresh)
        if tree.exists():
            tree.rename(Path(folder) / "broken")
        fresh.rename(tree)


def _write_tree(tree: Path) -> None:
    sizes: dict[str, int] = {}
    with np.load(_ARCHIVE) as archive:
        class_names = archive["class_names"]
        for class_name in class_names:
            for split in ("train", "val"):
                (tree / split / class_name).mkdir(parents=True)
        for split in ("train", "val"):
            for number, (image, label) in enumerate(
                zip(archive[f"{split}_images"], archive[f"{split}_labels"], strict=True)
            ):
                file = tree / split / class_names[label] / f"{number:05d}.png"
                Image.fromarray(image).save(file)
                sizes[str(file.relative_to(tree))] = file.stat().st_size
    (tree / _MANIFEST).write_text(json.dumps(sizes))
