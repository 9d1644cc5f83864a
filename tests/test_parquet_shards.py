"""Parquet shards: what is read, from where, and what is said when it cannot be."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_trees import epoch_of, ready, write_tree

from gradsync.convert import main as convert
from gradsync.datamodules import ImageNetDataModule, storage
from gradsync.datamodules.opening import open_data
from gradsync.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images in 6 shards, 30 in one to validate."""
    tree = write_tree(tmp_path_factory.mktemp("tree"), 100, 10)
    convert([str(tree), str(tree / "shards"), "--images-per-shard", "50"])
    return tree / "shards"


def error_of(root: Path | str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        ready(ImageNetDataModule(root, batch_size=2, num_workers=0, image_size=16, **kwargs))
    return str(caught.value)


def write_shards(folder: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> Path:
    for name in ("train-0.parquet", "val-0.parquet"):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / name)
    return folder


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_what_was_found_is_said(shards: Path) -> None:
    data = ready(ImageNetDataModule(shards, batch_size=4))
    assert data.description == (f"{shards} (Parquet, 6 + 1 shards, 3 classes): 300 train, 30 val images of 224x224")


def test_a_folder_of_shards_in_data_or_by_split(shards: Path, tmp_path: Path) -> None:
    for split, pattern in (("train", "train-*"), ("validation", "validation-*")):
        (tmp_path / split).mkdir()
        for number, shard in enumerate(sorted(shards.glob(pattern))):
            (tmp_path / split / f"{number:04d}.parquet").symlink_to(shard)
    opened = open_data(str(tmp_path), 2048, None)
    assert (len(opened.train), len(opened.val)) == (300, 30)


def test_every_image_comes_once_in_an_order_of_seed_and_epoch(shards: Path) -> None:
    source = open_data(str(shards), 70, None).train
    orders = [source.order(torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(300))


def test_no_more_row_groups_are_held_than_a_window_has(shards: Path) -> None:
    source: Any = open_data(str(shards), 70, None).train  # row groups of 50
    reads: list[int] = []
    read_group = source._read_group
    source._read_group = lambda group: reads.append(group) or read_group(group)
    for index in source.order(torch.Generator().manual_seed(0)).tolist():
        source.read(index)
        assert len(source._cache) <= 2
    assert sorted(reads) == list(range(6))  # each once, although its images come in any order


def test_classes_without_names_go_by_number(tmp_path: Path) -> None:
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())])
    rows = [{"image": {"bytes": b"", "path": ""}, "label": label} for label in (0, 4, 2)]
    assert open_data(str(write_shards(tmp_path, schema, rows)), 2048, None).train.class_names == list("01234")


def test_error_with_another_schema(tmp_path: Path) -> None:
    schema = pa.schema([("img", IMAGE), ("label", pa.string())])
    text = error_of(write_shards(tmp_path, schema, [{"img": None, "label": "a"}]))
    assert "expected: image: struct<bytes: binary, path: string>, label: int64" in text
    assert "found:    img: struct<bytes: binary, path: string>, label: string" in text


def test_error_with_an_incomplete_shard(shards: Path, tmp_path: Path) -> None:
    for shard in shards.glob("*.parquet"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes()[: -10 if "train-00002" in shard.name else None])
    assert "train-00002-of-00006.parquet is no complete Parquet file" in error_of(tmp_path)


def test_error_without_a_split(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").symlink_to(next(shards.glob("train-*")))
    assert "no validation-*.parquet or val-*.parquet there" in error_of(tmp_path)


def test_error_with_different_classes(tmp_path: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("val", ["a", "c"])):
        features = {"info": {"features": {"label": {"names": names}}}}
        metadata = {b"huggingface": json.dumps(features).encode()}
        schema = pa.schema([("image", IMAGE), ("label", pa.int64())], metadata)
        pq.write_table(
            pa.Table.from_pylist([{"image": {"bytes": b""}, "label": 0}], schema), tmp_path / f"{split}.parquet"
        )
    assert "Only in train/: b. Only in val/: c." in error_of(tmp_path)


def test_error_with_an_unknown_protocol() -> None:
    assert error_of("nosuch://bucket").startswith("--data.root nosuch://bucket: Protocol not known: nosuch")


# A real S3 server, on loopback, and between it and the reader a relay that cuts connections.


class Relay:
    """Forwards TCP; the first ``num_cuts`` answers that are longer than ``cut_after`` bytes end there."""

    def __init__(self, port: int, num_cuts: int = 0, cut_after: int = 20_000) -> None:
        self._target = port
        self._cut_after = cut_after
        self.cuts_left = num_cuts
        self.num_cut = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, sink, answers), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        num_bytes = 0
        try:
            while block := source.recv(4096):
                num_bytes += len(block)
                if answers and num_bytes > self._cut_after and self._cuts():
                    break
                sink.sendall(block)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _cuts(self) -> bool:
        with self._lock:
            if self.cuts_left == 0:
                return False
            self.cuts_left -= 1
            self.num_cut += 1
            return True

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def s3_port(shards: Path) -> Iterator[int]:
    """An S3 server with the shards in ``s3://images/set``."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    os.environ |= credentials(port)
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket.mkdir("images")
    bucket.put([str(path) for path in sorted(shards.glob("*.parquet"))], "s3://images/set/")
    yield port
    server.stop()


def credentials(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def relay(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Relay]]:
    relays: list[Relay] = []

    def start(**kwargs: Any) -> Relay:
        relays.append(Relay(s3_port, **kwargs))
        for name, value in credentials(relays[-1].port).items():
            monkeypatch.setenv(name, value)
        return relays[-1]

    fsspec.filesystem("s3").clear_instance_cache()
    yield start
    for one in relays:
        one.close()
    fsspec.filesystem("s3").clear_instance_cache()


def epoch(root: Path | str, num_workers: int = 0, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data = ready(ImageNetDataModule(root, 50, num_workers, 16, shuffle_window=120, **kwargs))
    return epoch_of(data, data.train_dataloader(), 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_s3_gives_the_same_and_loses_nothing_when_connections_are_cut(
    shards: Path, relay: Callable[..., Relay], num_workers: int
) -> None:
    num_cuts = storage.NUM_TRIES - 1  # whoever gets all of them still comes through
    one = relay(num_cuts=num_cuts)
    images, labels = epoch("s3://images/set", num_workers)
    assert one.num_cut == num_cuts
    expected_images, expected_labels = epoch(shards)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


def test_copies_of_remote_shards_are_fetched_once_by_all(
    shards: Path, relay: Callable[..., Relay], tmp_path: Path
) -> None:
    relay(num_cuts=2)
    images, _ = epoch("s3://images/set", num_workers=2, cache_dir=tmp_path)
    copies = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert sorted(path.stat().st_size for path in copies) == sorted(p.stat().st_size for p in shards.glob("*.parquet"))
    assert torch.equal(images, epoch(shards)[0])
    assert not list(tmp_path.glob("*.part"))


def test_error_with_a_server_that_does_not_answer(relay: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay().close()
    text = error_of("s3://images/set")
    assert text.startswith("--data.root s3://images/set: ")
    assert "cannot be read, after 5 tries: " in text


def test_error_with_a_bucket_that_is_not_there(relay: Callable[..., Relay]) -> None:
    relay()
    assert "s3://nobody" in error_of("s3://nobody/set")


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_rows_without_image_or_label_are_bad_samples(binary: pa.DataType, tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.struct({"bytes": binary, "path": pa.string()})), ("label", pa.int32())])
    rows = [{"bytes": b"first"}, {"bytes": None}, None, {"bytes": b""}, {"bytes": b"last"}]
    labels = [1, 0, 0, 2, None]
    write_shards(tmp_path, schema, [{"image": i, "label": n} for i, n in zip(rows, labels, strict=True)])
    source = open_data(str(tmp_path), 2048, None).train
    assert source.read(0) == (b"first", 1)
    assert source.read(3) == (b"", 2)
    for index in (1, 2, 4):
        with pytest.raises(OSError, match="no image or no label"):
            source.read(index)
