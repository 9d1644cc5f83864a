"""An image folder as Parquet shards: which image goes where, one shard written, one shard checked.

Which shard holds what follows from the images and the options alone. So shards may be written in any order and by any
process, and a conversion that was interrupted goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..checkpoints.replacing import replacing
from ..errors import UserError
from .decoding import UndecodableImage, decode
from .image_folder import ImageFolderSource

ROWS_PER_GROUP = 100
"""As Hugging Face writes images."""
PUBLISHED_NAME = {"train": "train", "val": "validation"}

_PLAN = b"gradsync.conversion"
_ROW_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@final
@dataclass(frozen=True)
class Encoding:
    """What becomes of each image's file: as it is; or decoded, its shorter side scaled down, and encoded anew.

    Args:
        resize: Pixels; smaller images stay as they are.
        quality: Of JPEG, 1 to 100.
    """

    resize: int | None = None
    quality: int = 90

    def of(self, content: bytes, name: str) -> bytes:
        """Raises: UserError, for an image that is to be scaled but cannot be decoded."""
        if self.resize is None:
            return content
        try:
            image = Image.fromarray(decode(content).permute(1, 2, 0).numpy())
        except UndecodableImage as error:
            raise UserError(f"cannot read the image {name}: {error}. Mend or remove it, and run again") from error
        shorter = min(image.size)
        if shorter <= self.resize:
            return content
        width, height = (round(side * self.resize / shorter) for side in image.size)
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


@final
@dataclass(frozen=True)
class Shard:
    """One file of a conversion, and the rows that belong into it: indices of the source."""

    path: Path
    rows: np.ndarray[Any, np.dtype[np.int64]]
    plan: str
    """Fingerprint of the whole conversion."""

    def is_complete(self) -> bool:
        """Raises: UserError, if the file is there but of another conversion, or damaged."""
        if not self.path.exists():
            return False
        try:
            footer = pq.read_metadata(self.path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove it, and run again") from error
        if (footer.metadata or {}).get(_PLAN) != self.plan.encode() or footer.num_rows != len(self.rows):
            raise UserError(
                f"{self.path} is of a conversion of other images or with other options: name an empty folder"
            )
        return True


@final
class Conversion:
    """All shards of one split.

    Args:
        source: The images.
        folder: Of the shards.
        split: ``train`` or ``val``.
        images_per_shard: The last shard may have less.
        shuffle_seed: Seed of the order of the rows; without it they stay in the source's order.
    """

    def __init__(
        self,
        source: ImageFolderSource,
        folder: Path,
        split: str,
        encoding: Encoding,
        images_per_shard: int,
        shuffle_seed: int | None,
    ) -> None:
        self.source = source
        self.encoding = encoding
        order = np.arange(len(source))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        count = -(-len(order) // images_per_shard)
        plan = source.fingerprint(f"{encoding} {images_per_shard} {shuffle_seed}")
        self.shards = [
            Shard(
                folder / f"{PUBLISHED_NAME[split]}-{number:05d}-of-{count:05d}.parquet",
                order[number * images_per_shard : (number + 1) * images_per_shard],
                plan,
            )
            for number in range(count)
        ]

    def write(self, shard: Shard, written: Callable[[int], object] = lambda _: None) -> str:
        """Write one shard, read it back and compare; return its SHA-256. Calls ``written`` with numbers of images.

        Raises:
            OSError: an image cannot be read, or the shard not be written.
            UserError: an image cannot be decoded, or what was read back differs from what was written.
        """
        digests: list[str] = []
        with replacing(shard.path, lambda file: self._write_rows(file, shard, digests, written)) as unfinished:
            found = list(_digests(unfinished))
            if found != digests:
                raise UserError(f"{shard.path}: what was read back differs from what was written; is the disk sound?")
            with unfinished.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    def _write_rows(self, file: Any, shard: Shard, digests: list[str], written: Callable[[int], object]) -> None:
        # JPEG cannot be compressed any further, and dictionaries of images would only cost memory.
        with pq.ParquetWriter(file, self._schema(shard.plan), compression="NONE", use_dictionary=False) as writer:
            for first in range(0, len(shard.rows), ROWS_PER_GROUP):
                rows = [self._row(index) for index in shard.rows[first : first + ROWS_PER_GROUP].tolist()]
                digests += [_digest(image["bytes"], label) for image, label in rows]
                images, labels = zip(*rows, strict=True)
                writer.write_batch(
                    pa.record_batch([pa.array(images, _ROW_TYPE), pa.array(labels, pa.int64())], writer.schema)
                )
                written(len(rows))

    def _row(self, index: int) -> tuple[dict[str, Any], int]:
        content, label = self.source.read(index)
        name = self.source.name(index)
        return {"bytes": self.encoding.of(content, name), "path": "/".join(Path(name).parts[-2:])}, label

    def _schema(self, plan: str) -> pa.Schema:
        """With the class names where Hugging Face's ``datasets`` looks for them."""
        label = {"names": self.source.class_names, "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        metadata = {b"huggingface": json.dumps(features).encode(), _PLAN: plan.encode()}
        return pa.schema([("image", _ROW_TYPE), ("label", pa.int64())], metadata)


def _digests(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as shard:
        for batch in shard.iter_batches(ROWS_PER_GROUP, columns=["image", "label"], use_threads=False):
            contents, labels = batch.column("image").field("bytes"), batch.column("label")
            yield from (_digest(c.as_py(), n.as_py()) for c, n in zip(contents, labels, strict=True))


def _digest(content: bytes, label: int) -> str:
    return f"{hashlib.sha256(content).hexdigest()} {label}"
