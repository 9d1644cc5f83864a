"""``gradsync convert``: what comes back is what went in, also after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from image_trees import epoch_of, ready, write_tree
from PIL import Image

from gradsync.convert import main as convert
from gradsync.datamodules import ImageNetDataModule
from gradsync.datamodules.opening import open_data
from gradsync.errors import UserError

NUM_CLASSES = 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images to train on, 40 to validate."""
    return write_tree(tmp_path_factory.mktemp("tree"), 500, 10, tuple("abcd"))


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("small"), 10, 2)


def contents(root: Path, split: str) -> list[tuple[bytes, int]]:
    source = getattr(open_data(str(root), 2048, None), split)
    return [source.read(index) for index in range(len(source))]


def data(root: Path, num_workers: int = 0, **kwargs: Any) -> ImageNetDataModule:
    return ready(ImageNetDataModule(root, batch_size=50, num_workers=num_workers, image_size=24, **kwargs))


def test_the_same_pixels_labels_and_order_come_back(tree: Path, tmp_path: Path) -> None:
    convert([str(tree), str(tmp_path / "shards"), "--images-per-shard", "300"])
    assert len(list((tmp_path / "shards").glob("train-*-of-00007.parquet"))) == 7
    folder, shards = data(tree), data(tmp_path / "shards")
    assert shards.class_names == folder.class_names
    for epoch in (0, 1):
        images, labels = epoch_of(folder, folder.train_dataloader(), epoch)
        for num_workers in (0, 2):
            other = data(tmp_path / "shards", num_workers)
            same_images, same_labels = epoch_of(other, other.train_dataloader(), epoch)
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)
    assert contents(tree, "val") == contents(tmp_path / "shards", "val")


def test_more_images_than_a_window_are_mixed_and_still_come_once(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsync.convert.DEFAULT_SHUFFLE_WINDOW", 400)
    convert([str(tree), str(tmp_path)])
    assert sorted(contents(tree, "train")) == sorted(contents(tmp_path, "train"))
    source = open_data(str(tmp_path), 400, None).train
    order = source.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(2000))
    assert order.tolist() == source.order(torch.Generator().manual_seed(0)).tolist()
    # In every window all classes, as in the whole: a quarter each, to 5 standard deviations.
    for window in order.split(400):
        counts = torch.bincount(torch.tensor([source.read(index)[1] for index in window.tolist()]), minlength=4)
        assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()


def test_kill_in_the_middle_and_run_again(tree: Path, tmp_path: Path) -> None:
    options = [str(tree), str(tmp_path), "--images-per-shard", "50", "--resize", "28", "--workers", "1"]
    # It stops by itself in the middle, or a fast one would be through before it is killed.
    code = f"""
import pathlib, sys, time
from gradsync import convert
write = convert._write
def write_three(*arguments):
    if len(list(pathlib.Path({str(tmp_path)!r}).glob("train-*.parquet"))) == 3:
        time.sleep(1000)
    return write(*arguments)
convert._write = write_three
convert.main(sys.argv[1:])
"""
    process = subprocess.Popen([sys.executable, "-c", code, *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(done := sorted(tmp_path.glob("train-*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(done) == 3
    # As if it had come while the list of checksums was written.
    (tmp_path / f".conversion.json.0123.{process.pid}.part").touch()
    kept = {path: path.stat().st_mtime_ns for path in done}
    subprocess.run([sys.executable, "-m", "gradsync", "convert", *options], check=True, stdout=subprocess.DEVNULL)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    shards = open_data(str(tmp_path), 2048, None)
    assert len(shards.train) == 2000
    names = [
        row["path"] for path in sorted(tmp_path.glob("train*")) for row in pq.read_table(path)["image"].to_pylist()
    ]
    assert names == [f"{name}/{number:04d}.jpg" for name in "abcd" for number in range(500)]
    assert not list(tmp_path.glob(".*"))
    sums = json.loads((tmp_path / "conversion.json").read_text())["sha256"]
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.parquet")}
    assert len(sums) == 41


def test_workers_end_with_a_killed_parent(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gradsync", "convert", str(tree), str(tmp_path), "--images-per-shard", "50"]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("train-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    while _lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _lives(process.pid)


def test_a_killed_worker_ends_the_conversion_with_a_word(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsync.convert._write", _kill_itself)
    assert "was killed, as the kernel does where memory is short" in error_of(tree, tmp_path, "--workers", 2)
    assert not list(tmp_path.iterdir())


def _kill_itself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_resize_scales_the_shorter_side(small_tree: Path, tmp_path: Path) -> None:
    convert([str(small_tree), str(tmp_path), "--resize", "16"])
    source = open_data(str(tmp_path), 2048, None).train
    for index in range(len(source)):
        content, _ = source.read(index)
        assert min(Image.open(BytesIO(content)).size) == 16


def test_huggingface_finds_the_class_names(small_tree: Path, tmp_path: Path) -> None:
    convert([str(small_tree), str(tmp_path)])
    schema = pq.read_schema(tmp_path / "train-00000-of-00001.parquet")
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert b'"names": ["a", "b", "c"], "_type": "ClassLabel"' in schema.metadata[b"huggingface"]
    assert (tmp_path / "validation-00000-of-00001.parquet").exists()


def error_of(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        convert([str(argument) for argument in arguments])
    return str(caught.value)


def test_errors(small_tree: Path, tmp_path: Path) -> None:
    assert "no such folder" in error_of(tmp_path / "nowhere", tmp_path / "out")
    convert([str(small_tree), str(tmp_path / "out")])
    assert "of other images or with other options" in error_of(small_tree, tmp_path / "out", "--resize", "16")
    (tmp_path / "out" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    assert "is damaged" in error_of(small_tree, tmp_path / "out")


def test_error_with_a_damaged_image_names_it(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 10, 2)
    (tree / "train" / "b" / "0003.jpg").write_bytes(b"no image")
    text = error_of(tree, tmp_path / "out", "--resize", "16")
    assert f"cannot read the image {tree}/train/b/0003.jpg" in text
    (tree / "train" / "b" / "0003.jpg").unlink()
    convert([str(tree), str(tmp_path / "out"), "--resize", "16"])


def test_error_where_no_space_is_left(small_tree: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A limit on a file's size stands for a full disk: the kernel says EFBIG for it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        text = error_of(small_tree, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "The same command goes on" in text
    assert not list(tmp_path.iterdir())
    convert([str(small_tree), str(tmp_path)])
