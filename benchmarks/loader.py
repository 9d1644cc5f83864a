"""How fast images are read, decoded, augmented and made the network's input, by one core.

    python benchmarks/loader.py

Every row trains on the same JPEG files of 500x375 pixels and 86 kB, made here from photographs of the package
scikit-image and read from the page cache. A row's time is that of whole batches of 224 pixels, float32, mirrored and
normalized, as the network would get them, with no loader process beside: so images_per_s is per core. Every round runs
each row in a fresh process; they take turns batch by batch, so that whatever slows the machine slows all of them.

Rows: classic (torchvision's ImageFolder with PIL, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize),
image_folder and parquet (gradsync's data module on the folder, and on what `gradsync convert` makes of it).

With --memory each row reads 20,000 images (or as many as it says) once instead, and the memory of its process is
watched: mib_at_quarter after a quarter of them, when the window of the parquet row is full, mib_at_end after all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import harness

ROW_NAMES = ("classic", "image_folder", "parquet")
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
SIZE, NUM_BYTES = (500, 375), 86_000
BATCH_SIZE = 64
MEMORY_IMAGES = 20_000
_CLASSES = 10
_TIMEOUT_S = 900


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--images", type=number, default=4096, help="different files (%(default)s)")
    parser.add_argument("--rounds", type=number, default=5, help="how often every row is measured (%(default)s)")
    parser.add_argument(
        "--memory", type=number, nargs="?", const=MEMORY_IMAGES, metavar="IMAGES", help="watch the memory instead"
    )
    rows = harness.names_out_of(ROW_NAMES)
    parser.add_argument("--rows", type=rows, default=list(ROW_NAMES), help=f"some of {','.join(ROW_NAMES)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    return parser.parse_args()


# -- the files -----------------------------------------------------------------------------------------------


def write_photographs(root: Path, num_files: int, num_images: int) -> float:
    """Image folder with ``num_images`` names for ``num_files`` different files; the mean size in bytes."""
    for split, count in (("train", num_images), ("val", _CLASSES)):
        for number in range(count):
            folder = root / split / f"class{number % _CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:06d}.jpeg").hardlink_to(_file(root / "files", number % num_files))
    sizes = [file.stat().st_size for file in (root / "files").iterdir()]
    return sum(sizes) / len(sizes)


def _file(folder: Path, number: int) -> Path:
    path = folder / f"{number}.jpeg"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_bytes(_photograph(number))
    return path


def _photograph(number: int) -> bytes:
    """A part of one of the photographs, as JPEG of the quality that comes nearest to the wanted size."""
    import numpy as np
    from PIL import Image
    from skimage import data

    rng = np.random.default_rng(number)
    source = Image.fromarray(getattr(data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())
    share = rng.uniform(0.8, 1.0)
    width = int(share * min(source.width, source.height * SIZE[0] / SIZE[1]))
    height = int(width * SIZE[1] / SIZE[0])
    left, top = rng.integers(0, source.width - width + 1), rng.integers(0, source.height - height + 1)
    image = source.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.LANCZOS)
    encoded = (_jpeg(image, quality) for quality in range(70, 101, 2))
    return min(encoded, key=lambda content: abs(len(content) - NUM_BYTES))


def _jpeg(image: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# -- the rows ------------------------------------------------------------------------------------------------


def batches(row: str, root: Path) -> Iterator[Any]:
    """One epoch of batches as the network gets them."""
    if row == "classic":
        return iter(_classic(root / "folder"))
    from gradsync.datamodules import ImageNetDataModule

    data = ImageNetDataModule(root / ("folder" if row == "image_folder" else "shards"), BATCH_SIZE, num_workers=0)
    data.setup("fit")
    return (data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader())


def _classic(root: Path) -> Any:
    import torch
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    images = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True)


def rows_in_turn(rows: Sequence[str], root: Path) -> Callable[[str], harness.Metrics]:
    """Called with each row once a round: images per second of a whole epoch, after two batches of another."""
    measured: dict[str, float] = {}

    def measure(row: str) -> harness.Metrics:
        if row not in measured:
            with contextlib.closing(Turns(len(rows))) as turns:
                spent_s = harness.run_processes(partial(_time_epoch, rows, root, turns), len(rows), _TIMEOUT_S)
            measured.update(zip(rows, spent_s, strict=True))
        return {"images_per_s": 1 / measured.pop(row)}

    return measure


@final
class Turns:
    """For processes that are forked later: one of them at a time."""

    def __init__(self, size: int) -> None:
        self._pipes = [os.pipe() for _ in range(size)]
        self.end(size - 1)

    def wait(self, index: int) -> None:
        os.read(self._pipes[index][0], 1)

    def end(self, index: int) -> None:
        os.write(self._pipes[(index + 1) % len(self._pipes)][1], b".")

    def close(self) -> None:
        for pipe in self._pipes:
            for end in pipe:
                os.close(end)


def _time_epoch(rows: Sequence[str], root: Path, turns: Turns, process: harness.Process) -> float:
    import torch

    row = rows[process.index]
    torch.set_num_threads(1)
    turns.wait(process.index)
    warmup = batches(row, root)
    for _ in range(2):
        next(warmup)
    del warmup  # and its memory: else the row that holds images would be charged for twice as much
    spent_s, num_images = 0.0, 0
    start = time.perf_counter()
    for images, _ in batches(row, root):  # with everything read anew
        if images.shape[1:] != (3, 224, 224) or images.dtype != torch.float32:
            raise ValueError(f"{row} gave {tuple(images.shape)} {images.dtype}")
        num_images += len(images)
        spent_s += time.perf_counter() - start
        turns.end(process.index)
        turns.wait(process.index)
        start = time.perf_counter()
    turns.end(process.index)
    return spent_s / num_images


def watch_memory(row: str, root: Path) -> harness.Metrics:
    """Resident memory of a fresh process in MiB, while it reads every image once."""
    [metrics] = harness.run_processes(lambda _: _read_and_watch(row, root), 1, _TIMEOUT_S)
    return metrics


def _read_and_watch(row: str, root: Path) -> harness.Metrics:
    import torch

    torch.set_num_threads(1)
    sizes = []
    for _ in batches(row, root):
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    quarter = sizes[len(sizes) // 4]
    return {
        "mib_at_quarter": quarter,
        "mib_at_end": sizes[-1],
        "mib_most_after": max(sizes[len(sizes) // 4 :]),
        "growth": sizes[-1] / quarter,
    }


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch, once for all processes ...", flush=True)
    from gradsync.callbacks import machine_environment
    from gradsync.convert import main as convert

    environment = machine_environment()
    with tempfile.TemporaryDirectory(prefix="gradsync-loader-") as folder:
        root = Path(folder)
        num_images = arguments.memory or arguments.images
        print(f"Writing {arguments.images} files ...", flush=True)
        mean_bytes = write_photographs(root / "folder", arguments.images, num_images)
        if "parquet" in arguments.rows:
            convert([str(root / "folder"), str(root / "shards")])
        in_turn = rows_in_turn(arguments.rows, root)
        way = (lambda row: watch_memory(row, root)) if arguments.memory else in_turn
        rows = {name: lambda name=name: way(name) for name in arguments.rows}
        rounds = harness.Rounds(rows, "mib_at_end" if arguments.memory else "images_per_s")
        rounds.run(1 if arguments.memory else arguments.rounds)
    summary = rounds.summary() if arguments.memory else _ratios(rounds)
    print(f"\n{num_images:,} images of {SIZE[0]}x{SIZE[1]} pixels, {mean_bytes / 1000:.0f} kB on average, one core\n")
    harness.print_table(summary)
    if not arguments.memory:
        print("\nMedian (min - max) over rounds; a ratio is taken within a round, and above 1 is faster.")
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    return harness.conclude("loader", arguments, environment, summary, rounds.failed)


def _ratios(rounds: harness.Rounds) -> harness.Summary:
    return rounds.summary(("classic", "image_folder"), "images_per_s")


if __name__ == "__main__":
    harness.run(main)
