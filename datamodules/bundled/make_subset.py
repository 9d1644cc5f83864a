#!/usr/bin/env python3
"""Make ``fashion_mnist_subset.npz`` from the files of Debian's package ``dataset-fashion-mnist``.

    python make_subset.py [FOLDER]

FOLDER holds the four ``*-ubyte.gz`` files. Training images come from Fashion-MNIST's training set, validation images
from its test set: the first ones of every class, in their original order, so the result is the same everywhere.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
OUTPUT = Path(__file__).parent / "fashion_mnist_subset.npz"
CLASS_NAMES = [
    "t-shirt_top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
]
TRAIN_PER_CLASS = 160
VAL_PER_CLASS = 40


def read_idx(path: Path) -> UInt8Array:
    """Read an IDX file of unsigned bytes: magic, number of dimensions, big-endian sizes, data."""
    content = gzip.decompress(path.read_bytes())
    num_dimensions = content[3]
    header = 4 + 4 * num_dimensions
    shape = np.frombuffer(content[4:header], dtype=">u4").astype(int)
    return np.frombuffer(content[header:], dtype=np.uint8).reshape(shape)


def first_of_every_class(folder: Path, prefix: str, per_class: int) -> tuple[UInt8Array, UInt8Array]:
    """Images (N, 28, 28) and labels (N,) of the first ``per_class`` images of every class, in the order of the file."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASS_NAMES))]))
    return images[chosen], labels[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DEBIAN_FOLDER, metavar="FOLDER")
    folder = parser.parse_args().folder
    train_images, train_labels = first_of_every_class(folder, "train", TRAIN_PER_CLASS)
    val_images, val_labels = first_of_every_class(folder, "t10k", VAL_PER_CLASS)
    np.savez_compressed(
        OUTPUT,
        train_images=train_images,
        train_labels=train_labels,
        val_images=val_images,
        val_labels=val_labels,
        class_names=np.array(CLASS_NAMES),
    )
    print(f"{OUTPUT}: {len(train_images)} training, {len(val_images)} validation images, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
