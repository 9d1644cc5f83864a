"""``gradsync convert``: an image folder to Parquet shards, in parallel, resumable, checked."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .argument_types import positive_int
from .checkpoints.replacing import remove_leftovers
from .datamodules.conversion import Conversion, Encoding, Shard
from .datamodules.image_folder import ImageFolderSource
from .datamodules.imagenet import DEFAULT_SHUFFLE_WINDOW
from .datamodules.opening import open_folder
from .errors import UserError
from .processes import end_with
from .report import atomic_write_json

MANIFEST = "conversion.json"
_POLL_S = 0.2
_SHUFFLE_SEED = 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync convert",
        description="Write an image folder (train/<class>/*, val/<class>/*) as Parquet shards, as Hugging Face "
        "publishes image data sets. Shards that are there are kept: the same command goes on where it was interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder with train/ and val/")
    add("target", type=Path, metavar="DST", help="folder of the shards")
    add("--resize", type=positive_int, metavar="PIXELS", help="scale the shorter side down to this, and encode anew")
    add("--quality", type=positive_int, default=90, metavar="Q", help="of JPEG, 1 to 100, with --resize (default 90)")
    add("--images-per-shard", type=positive_int, default=4096, metavar="N", help="(default 4096)")
    add("--workers", type=positive_int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    return parser


def main(arguments: list[str]) -> None:
    """Run the command. Blocks until all shards are written and checked.

    Raises:
        UserError: nothing to convert, another conversion's shards in DST, an image that cannot be read, a full disk.
    """
    options = _parser().parse_args(arguments)
    if options.quality > 100:
        raise UserError(f"--quality must be at most 100, got {options.quality}")
    console = Console(highlight=False)
    opened = open_folder(options.source)
    _prepare(options.target)
    conversions = {
        split: _conversion(options, split, source) for split, source in (("train", opened[0]), ("val", opened[1]))
    }
    missing = [(c, shard) for c in conversions.values() for shard in c.shards if not shard.is_complete()]
    num_shards = sum(len(conversion.shards) for conversion in conversions.values())
    if len(missing) < num_shards:
        console.print(f"{num_shards - len(missing)} of {num_shards} shards are there already")
    manifest = Manifest(options, {split: len(conversion.source) for split, conversion in conversions.items()})
    _write_all(missing, options, manifest, console)
    _summarize(conversions, options, manifest, console)


def _prepare(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; name another folder") from error


def _conversion(options: argparse.Namespace, split: str, source: ImageFolderSource) -> Conversion:
    # Training shuffles row groups, and images only within a window: a larger set must not be sorted by class.
    shuffles = split == "train" and len(source) > DEFAULT_SHUFFLE_WINDOW
    encoding = Encoding(options.resize, options.quality)
    seed = _SHUFFLE_SEED if shuffles else None
    return Conversion(source, options.target, split, encoding, options.images_per_shard, seed)


@final
class Manifest:
    """``conversion.json``: what was converted, how, and each shard's checksum; rewritten for each shard."""

    def __init__(self, options: argparse.Namespace, num_images: dict[str, int]) -> None:
        self._path = options.target / MANIFEST
        self._header = {
            "source": str(options.source.absolute()),
            "images": num_images,
            "resize": options.resize,
            "quality": options.quality if options.resize else None,
        }
        try:
            self._sums: dict[str, str] = json.loads(self._path.read_text())["sha256"]
        except (OSError, ValueError, KeyError):  # the first run, or one that was killed before its first shard
            self._sums = {}

    def add(self, name: str, sha256: str) -> None:
        self._sums[name] = sha256
        atomic_write_json(self._path, {**self._header, "sha256": dict(sorted(self._sums.items()))})

    def complete(self, shards: list[Path]) -> None:
        """Add those that a killed run wrote, but did not note."""
        for path in shards:
            if path.name not in self._sums:
                with path.open("rb") as file:
                    self.add(path.name, hashlib.file_digest(file, "sha256").hexdigest())


def _write_all(
    missing: list[tuple[Conversion, Shard]], options: argparse.Namespace, manifest: Manifest, console: Console
) -> None:
    """One process for each shard at a time, with a bar over the images."""
    if not missing:
        return
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    total = sum(len(shard.rows) for _, shard in missing)
    pool = ProcessPoolExecutor(min(options.workers, len(missing)), context, _start_worker, (counter, os.getpid()))
    try:
        futures = [pool.submit(_write, conversion, shard) for conversion, shard in missing]
        _follow(futures, counter, total, manifest, console)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    _raise_first(futures, options.target)


_counter: Any = None


def _start_worker(counter: Any, parent: int) -> None:
    """In a worker process: end with the one that started it, leave Ctrl-C to it."""
    global _counter
    _counter = counter
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write(conversion: Conversion, shard: Shard) -> tuple[str, str]:
    """Name and SHA-256."""

    def written(num_images: int) -> None:
        with _counter.get_lock():
            _counter.value += num_images

    return shard.path.name, conversion.write(shard, written)


def _follow(
    futures: list[Future[tuple[str, str]]], counter: Any, total: int, manifest: Manifest, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images, left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("converting", total=total)
        pending = set(futures)
        while pending and not any(future.done() and future.exception() for future in futures):
            done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
            for future in done:
                if future.exception() is None:
                    manifest.add(*future.result())
            progress.update(task, completed=counter.value)


def _raise_first(futures: list[Future[tuple[str, str]]], target: Path) -> None:
    error = next((f.exception() for f in futures if f.done() and not f.cancelled() and f.exception()), None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"no space left in {target}: free some, and run the same command again, which goes on"
        ) from error
    if isinstance(error, BrokenProcessPool):
        raise UserError(
            "a process of the conversion was killed, as the kernel does where memory is short: run the same command"
            " again, which goes on, with fewer --workers"
        ) from error
    if isinstance(error, OSError):
        raise UserError(f"{error}. The same command goes on where it stopped") from error
    if error is not None:
        raise error


def _summarize(
    conversions: dict[str, Conversion], options: argparse.Namespace, manifest: Manifest, console: Console
) -> None:
    shards = [shard.path for conversion in conversions.values() for shard in conversion.shards]
    manifest.complete(shards)
    size = sum(path.stat().st_size for path in shards)
    train, val = (len(conversion.source) for conversion in conversions.values())
    console.print(
        f"{train} train and {val} val images in {len(shards)} shards, {size / 2**30:.2f} GiB, all read back and"
        f" compared; checksums in {options.target / MANIFEST}\n"
        f"Train on them: gradsync fit --data.root {shlex.quote(str(options.target))}",
        soft_wrap=True,
        markup=False,
    )
