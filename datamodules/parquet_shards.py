"""Parquet shards as Hugging Face publishes image data sets: ``image: struct<bytes, path>`` and ``label``.

https://huggingface.co/docs/datasets/image_dataset. A shard is read by row groups, not by images. So an epoch is
shuffled in two stages: all row groups of all shards, then the images within a window of as many row groups as make up
``shuffle_window`` images, which every loader worker holds in memory while it lasts.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from typing_extensions import override

from ..errors import UserError
from .image_source import ImageSource
from .storage import Storage

SCHEMA = "image: struct<bytes: binary, path: string>, label: int64"
_SPLIT = {"train": re.compile(r"^train\b"), "val": re.compile(r"^val(idation)?\b")}
_MOST_THREADS = 16
_BYTES, _LABEL = "image.bytes", "label"


def find_shards(storage: Storage) -> dict[str, list[str]]:
    """Shards of ``train`` and ``val``, told by the beginning of the file's or its folder's name; empty without any."""
    # Two levels: the data set may lie in `data/`, a split in a folder of its own.
    paths = storage.find(".parquet", max_depth=2)
    return {
        split: [path for path in paths if any(begins.match(part) for part in path.split("/")[-2:])]
        for split, begins in _SPLIT.items()
    }


@final
class _RowGroup:
    """The images of a row group in one block of memory. Arrow's own access by row would copy each of them twice."""

    def __init__(self, table: pa.Table) -> None:
        columns = table.combine_chunks()
        contents = columns["image"].chunk(0).field("bytes")
        _, offsets, block = contents.buffers()
        width = np.int64 if pa.types.is_large_binary(contents.type) else np.int32
        self._offsets = np.frombuffer(offsets, width)[contents.offset : contents.offset + len(contents) + 1]
        self._block = memoryview(block or b"")
        self._is_there = contents.is_valid().to_numpy(zero_copy_only=False)
        self._labels = columns[_LABEL].chunk(0).cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)

    def row(self, row: int) -> tuple[bytes, int]:
        """Content and label. Raises: OSError, for a row without one of them."""
        label = int(self._labels[row])
        if not self._is_there[row] or label < 0:
            raise OSError("the row has no image or no label")
        return bytes(self._block[self._offsets[row] : self._offsets[row + 1]]), label


@final
class ParquetSource(ImageSource):
    """Images of one split. Reads the shards' footers now, and a row group when one of its images is asked for.

    Args:
        shuffle_window: Number of images that are shuffled, and held in memory, together.

    Raises:
        UserError: a shard cannot be read, or has another schema or no rows.
    """

    def __init__(self, storage: Storage, shards: list[str], shuffle_window: int) -> None:
        self._storage = storage
        self._shards = shards
        self._window = shuffle_window
        with ThreadPoolExecutor(1 if storage.is_local else _MOST_THREADS) as threads:
            self._footers = list(threads.map(self._footer, shards))
        rows = [[footer.row_group(g).num_rows for g in range(footer.num_row_groups)] for footer in self._footers]
        self._groups = [(shard, group) for shard, counts in enumerate(rows) for group in range(len(counts))]
        sizes = np.array([count for counts in rows for count in counts], dtype=np.int64)
        self._first: list[int] = [0, *np.cumsum(sizes).tolist()]
        if len(self) == 0:
            raise UserError(f"--data.root {storage.root}: {shards[0]} and its like hold no rows")
        self.class_names = self._class_names()
        self._cache: OrderedDict[int, _RowGroup] = OrderedDict()
        # As many of the smallest groups as make up a window: no window has more.
        self._most_cached = int(np.searchsorted(np.cumsum(np.sort(sizes)), shuffle_window)) + 1

    def _footer(self, path: str) -> pq.FileMetaData:
        footer = self._storage.read(path, lambda file: _opened(path, file).metadata)
        schema = footer.schema.to_arrow_schema()
        if not _is_image_schema(schema):
            found = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise UserError(
                f"--data.root: {path} has not the columns of an image data set.\n"
                f"  expected: {SCHEMA}\n"
                f"  found:    {found}"
            )
        return footer

    def _class_names(self) -> list[str]:
        """From what Hugging Face writes beside the schema; else the labels' numbers."""
        metadata = self._footers[0].metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return [str(name) for name in features["label"]["names"]]
        except (KeyError, TypeError, ValueError):
            return [str(label) for label in range(self._largest_label() + 1)]

    def _largest_label(self) -> int:
        largest = 0
        for shard, group in self._groups:
            footer = self._footers[shard].row_group(group)
            columns = [footer.column(number) for number in range(footer.num_columns)]
            statistics = next(c.statistics for c in columns if c.path_in_schema == _LABEL)
            if statistics is None or not statistics.has_min_max:
                raise UserError(f"--data.root: {self._shards[shard]} names no classes and has no label statistics")
            largest = max(largest, statistics.max)
        return largest

    @override
    def __len__(self) -> int:
        return self._first[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Row group and row."""
        group = bisect_right(self._first, index) - 1
        return group, index - self._first[group]

    @override
    def name(self, index: int) -> str:
        group, row = self._place(index)
        shard, _ = self._groups[group]
        first = next(g for g, (s, _) in enumerate(self._groups) if s == shard)
        return f"{self._shards[shard]}, row {self._first[group] - self._first[first] + row}"

    @override
    def read(self, index: int) -> tuple[bytes, int]:
        group, row = self._place(index)
        if group in self._cache:
            self._cache.move_to_end(group)
        else:
            while len(self._cache) >= self._most_cached:
                self._cache.popitem(last=False)
            self._cache[group] = self._read_group(group)
        return self._cache[group].row(row)

    def _read_group(self, group: int) -> _RowGroup:
        shard, number = self._groups[group]
        path = self._shards[shard]

        def read(file: Any) -> pa.Table:
            # pre_buffer: one request for a column, where the storage is remote.
            with pq.ParquetFile(file, metadata=self._footers[shard], pre_buffer=True) as shard_file:
                return shard_file.read_row_group(number, columns=[_BYTES, _LABEL], use_threads=False)

        try:
            return _RowGroup(self._storage.read(path, read))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--data.root: row group {number} of {path} cannot be read: {error}") from error

    @override
    def order(self, generator: torch.Generator) -> Tensor:
        if len(self) <= self._window:  # in the order in which the same images in folders would be
            return super().order(generator)
        groups = torch.randperm(len(self._groups), generator=generator)
        parts: list[Tensor] = []
        window: list[Tensor] = []
        num_images = 0
        for group in groups.tolist():
            indices = torch.arange(self._first[group], self._first[group + 1])
            window.append(indices)
            num_images += len(indices)
            if num_images >= self._window:
                parts.append(_shuffled(window, generator))
                window, num_images = [], 0
        if window:
            parts.append(_shuffled(window, generator))
        return torch.cat(parts)


def _is_image_schema(schema: pa.Schema) -> bool:
    types: dict[str, Any] = {field.name: field.type for field in schema}
    image, label = types.get("image"), types.get("label", pa.null())
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        return False
    content = image.field("bytes").type
    return (pa.types.is_binary(content) or pa.types.is_large_binary(content)) and pa.types.is_integer(label)


def _opened(path: str, file: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"--data.root: {path} is no complete Parquet file: {error}") from error


def _shuffled(indices: list[Tensor], generator: torch.Generator) -> Tensor:
    joined = torch.cat(indices)
    return joined[torch.randperm(len(joined), generator=generator)]
