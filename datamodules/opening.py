"""From ``--data.root`` to the images of both splits: what format it has, whether it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from ..errors import UserError
from .image_folder import ImageFolderSource
from .image_source import ImageSource
from .parquet_shards import ParquetSource, find_shards
from .storage import Storage


@final
@dataclass(frozen=True)
class OpenedData:
    """Both splits, with the same classes, and what they were found to be."""

    train: ImageSource
    val: ImageSource
    found: str


def open_data(root: str, shuffle_window: int, cache_dir: Path | None) -> OpenedData:
    """Parquet shards if there are any, else an image folder.

    Raises:
        UserError: neither is there, or it is not complete, or it cannot be read.
    """
    storage = Storage(root, cache_dir)
    shards = find_shards(storage)
    if any(shards.values()):
        return _open_shards(storage, shards, shuffle_window)
    if not storage.is_local:
        raise UserError(f"--data.root {root}: no train-*.parquet there.\n{_expected(root)}")
    return OpenedData(*open_folder(_local(root)), "image folder")


def check_root(root: str) -> None:
    """Whether there is something of the expected shape, without reading it all.

    Raises:
        UserError: as :func:`open_data`, as far as that can be known soon.
    """
    storage = Storage(root)
    if not any(find_shards(storage).values()):
        if not storage.is_local:
            raise UserError(f"--data.root {root}: no train-*.parquet there.\n{_expected(root)}")
        _check_folder(_local(root))


def _local(root: str) -> Path:
    return Path(root.removeprefix("file://"))


def _open_shards(storage: Storage, shards: dict[str, list[str]], shuffle_window: int) -> OpenedData:
    for split, names in (("train", "train-*.parquet"), ("val", "validation-*.parquet or val-*.parquet")):
        if not shards[split]:
            raise UserError(f"--data.root {storage.root}: no {names} there.\n{_expected(storage.root)}")
    train, val = (ParquetSource(storage, shards[split], shuffle_window) for split in ("train", "val"))
    _check_same_classes(train, val, storage.root)
    return OpenedData(train, val, f"Parquet, {len(shards['train'])} + {len(shards['val'])} shards")


def open_folder(root: Path) -> tuple[ImageFolderSource, ImageFolderSource]:
    """Training and validation images of an image folder.

    Raises:
        UserError: as :func:`open_data`.
    """
    _check_folder(root)
    try:
        train, val = (ImageFolderSource(root / split) for split in ("train", "val"))
    except FileNotFoundError as error:  # no class folder, or one without images
        raise UserError(f"{error}\n{_expected(str(root))}") from error
    _check_same_classes(train, val, str(root))
    return train, val


def _check_folder(root: Path) -> None:
    missing = [str(folder) for folder in (root, root / "train", root / "val") if not folder.is_dir()]
    if missing:
        looked = f"Looked for {root / 'train'} and {root / 'val'}, and for Parquet shards."
        raise UserError(f"no such folder: {', '.join(missing)}. {looked}\n{_expected(str(root))}")


def _check_same_classes(train: ImageSource, val: ImageSource, root: str) -> None:
    ours, theirs = train.class_names, val.class_names
    if ours == theirs:
        return
    if sorted(ours) == sorted(theirs):
        raise UserError(f"train and val of {root} name the same classes in another order: write both anew from one")
    only_train, only_val = (_shortened(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours)))
    raise UserError(
        f"train/ and val/ must hold the same classes. Only in train/: {only_train}. Only in val/: {only_val}.\n"
        f"{_expected(root)}"
    )


def _expected(root: str) -> str:
    return (
        f"Expected below --data.root, an image folder (on a local disk):\n"
        f"  {root}/\n"
        f"    train/\n"
        f"      <class>/   one folder per class, with its images (.jpeg, .jpg, .png, ...)\n"
        f"    val/\n"
        f"      <class>/   the same class names\n"
        f"or Parquet shards (also at s3://, gs://, hf://), there or in data/:\n"
        f"  train-00000-of-00001.parquet, validation-00000-of-00001.parquet, ...\n"
        f"Leave --data.root out to train on the bundled demo images."
    )


def _shortened(names: set[str], most: int = 5) -> str:
    listed = ", ".join(sorted(names)[:most]) or "none"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
