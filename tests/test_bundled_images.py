"""The bundled images: what is in the package, and its unpacking into the cache folder."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import pytest
from distributed import run_distributed
from PIL import Image

from gradsync.datamodules import bundled, bundled_images
from gradsync.datamodules.bundled import make_subset
from gradsync.datamodules.bundled_images import bundled_image_tree, cache_folder, is_complete
from gradsync.errors import UserError

ARCHIVE = make_subset.OUTPUT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADSYNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def test_the_package_holds_a_balanced_subset_and_its_licence() -> None:
    assert ARCHIVE.stat().st_size <= 1_500_000
    with np.load(ARCHIVE) as archive:
        assert archive["train_images"].shape == (1600, 28, 28)
        assert archive["val_images"].shape == (400, 28, 28)
        assert set(np.bincount(archive["train_labels"])) == {160}
        assert set(np.bincount(archive["val_labels"])) == {40}
    licence = (Path(bundled.__file__).parent / "LICENSE").read_text()
    assert "The MIT License" in licence
    assert "Zalando SE" in licence


def test_the_script_takes_the_first_of_every_class_in_file_order(tmp_path: Path) -> None:
    labels = np.array([*range(10), 3, *range(10)], dtype=np.uint8)
    images = np.arange(len(labels) * 784, dtype=np.uint32).astype(np.uint8).reshape(-1, 28, 28)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    chosen_images, chosen_labels = make_subset.first_of_every_class(tmp_path, "train", per_class=1)
    assert chosen_labels.tolist() == list(range(10))
    assert (chosen_images == images[:10]).all()


def test_the_tree_holds_the_images_of_the_archive(cache: Path) -> None:
    tree = bundled_image_tree()
    assert tree.parent == cache
    with np.load(ARCHIVE) as archive:
        names = archive["class_names"].tolist()
        for split, per_class in (("train", 160), ("val", 40)):
            folders = {folder.name: sorted(folder.iterdir()) for folder in (tree / split).iterdir()}
            assert {name: len(files) for name, files in folders.items()} == dict.fromkeys(names, per_class)
            for label, name in enumerate(names):
                expected = archive[f"{split}_images"][archive[f"{split}_labels"] == label]
                assert all((np.array(Image.open(f)) == e).all() for f, e in zip(folders[name], expected, strict=True))


def test_a_complete_tree_is_left_alone(cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundled_image_tree().rglob("*")}
    time.sleep(0.02)
    assert {path: path.stat().st_mtime_ns for path in bundled_image_tree().rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "manifest", "folder"])
def test_a_damaged_tree_is_repaired(cache: Path, damage: str) -> None:
    tree = bundled_image_tree()
    before = contents(tree)
    victim = next((tree / "train" / "bag").iterdir())
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:10])
    elif damage == "foreign":
        victim.with_name("mine.png").write_bytes(b"")
    elif damage == "manifest":
        (tree / "manifest.json").write_text("{")
    else:
        (tree / "val").rename(tree / "elsewhere")
    assert not is_complete(tree)
    assert bundled_image_tree() == tree
    assert contents(tree) == before


def test_what_a_killed_process_left_behind_goes_away(cache: Path) -> None:
    name = bundled_image_tree().name
    next((cache / name / "val" / "bag").iterdir()).unlink()
    (cache / f".{name}.unpacking-killed" / "tree" / "train").mkdir(parents=True)
    bundled_image_tree()
    assert sorted(path.name for path in cache.iterdir()) == [f".{name}.lock", name]


def _unpack(rank: int) -> tuple[Path, bool]:
    tree = bundled_image_tree()
    return tree, is_complete(tree)


def test_several_processes_at_once(cache: Path) -> None:
    results = run_distributed(_unpack, 4)
    assert len(set(results)) == 1
    tree, complete = results[0]
    assert complete
    assert sorted(path.name for path in cache.iterdir()) == [f".{tree.name}.lock", tree.name]


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSYNC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/gradsync")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/somebody/.cache/gradsync")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/gradsync")
    monkeypatch.setenv("GRADSYNC_CACHE", "~/images")
    assert cache_folder() == Path("/home/somebody/images")


def test_error_where_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADSYNC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        bundled_image_tree()
    text = str(caught.value)
    assert text.startswith(f"cannot unpack the bundled images into {tmp_path}/file/cache/fashion-mnist-")
    assert "writable folder in the environment variable GRADSYNC_CACHE" in text
    assert "--data.root" in text


def test_a_new_version_of_the_images_gets_a_new_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundled_image_tree()
    changed = cache / "changed.npz"
    with np.load(ARCHIVE) as archive:
        np.savez_compressed(changed, **{**archive, "val_images": 255 - archive["val_images"]})
    monkeypatch.setattr(bundled_images, "_ARCHIVE", changed)
    assert bundled_image_tree() != first
