"""``gradsync doctor``: whether this machine is fit for a long run, and what to change."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from .argument_types import positive_float, positive_int
from .doctor_output import Screen
from .errors import UserError
from .health import Check, PlannedRun
from .health.check import or_failure, or_warning
from .health.communication import communication_checks
from .health.disks import check_data, check_output
from .health.gpus import Gpus, find_gpus, gpu_checks
from .health.machine import (
    check_container,
    check_cores,
    check_descriptors,
    check_kernel,
    check_load,
    check_memory,
    num_cores,
)
from .health.network import check_host_name, check_interfaces, check_loopback, check_meeting_place
from .health.planned_run import Launched
from .health.ranks import join_launched, start_here
from .health.shared_memory import check_leftovers, check_shm
from .health.versions import check_versions

_MOST_RANKS_ON_CPU = 4
_STORAGE = {"output", "data"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync doctor",
        description="Check this machine before a long run, and say what to change. Starts ranks that talk to each "
        "other, or takes those of torchrun. Exit code 0 if nothing is marked FAIL, else 1.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--devices",
        type=positive_int,
        metavar="N",
        help="ranks of the run (default: all GPUs; on the CPU as many as cores, at most 4)",
    )
    add("--data-dir", metavar="DIR", help="images or Parquet shards, a folder or URL: some are read")
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs go: a file is written (default runs)",
    )
    add("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="gloo on the CPU, NCCL on GPUs")
    add(
        "--timeout",
        type=positive_float("seconds"),
        default=60.0,
        metavar="SECONDS",
        help="how long ranks, or a disk, may hang (default 60)",
    )
    add("--json", type=Path, metavar="FILE", help="write the checks there too")
    return parser


def main(arguments: list[str]) -> None:
    """Run the command; leaves with code 1 if a check fails. Under torchrun every process calls it, and rank 0 prints.

    Raises:
        UserError: ``--json`` cannot be written, or the launcher's variables make no sense.
    """
    options = _parser().parse_args(arguments)
    try:
        launched = Launched.from_environment()
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and MASTER_PORT must be whole numbers: {error}; unset them") from error
    gpus = find_gpus()
    run = _planned(options, gpus, launched)
    if launched and launched.rank > 0:
        # Not by its exit code: torchrun would end rank 0 before it has printed.
        for failure in join_launched(run, launched).failures:
            print(f"gradsync doctor: rank {failure.rank}: {failure.text}", file=sys.stderr)
        return
    screen = Screen(Console(highlight=False))
    with _writing(options.json):
        screen.begin(run, launched)
        for check in _checks(run, gpus, launched):
            screen.show(check)
        failed = screen.end(run, ["gradsync", "doctor", *arguments], options.json)
    if failed:
        sys.exit(1)


def _planned(options: argparse.Namespace, gpus: Gpus, launched: Launched | None) -> PlannedRun:
    on_gpu = options.accelerator == "gpu" or (options.accelerator == "auto" and len(gpus) > 0)
    default = (len(gpus) or 1) if on_gpu else min(_MOST_RANKS_ON_CPU, num_cores())
    if launched and options.devices not in (None, launched.local_world_size):
        raise UserError(
            f"the launcher started {launched.local_world_size} processes here, but --devices says {options.devices}: "
            "leave the flag out"
        )
    devices = launched.local_world_size if launched else options.devices or default
    return PlannedRun(devices, "gpu" if on_gpu else "cpu", options.output, options.data_dir, options.timeout)


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if path is None or error.filename != str(path):
            raise
        raise UserError(f"--json {path} cannot be written: {error.strerror}; name another file") from error


def _checks(run: PlannedRun, gpus: Gpus, launched: Launched | None) -> Iterator[Check]:
    """One after another, as they are looked at; the ranks last, which take longest."""
    # Under a launcher they come first: the other ranks are waiting.
    trial = join_launched(run, launched) if launched else None
    for name, look in _looks(run, launched).items():
        yield or_failure(name, look, run.timeout_s) if name in _STORAGE else or_warning(name, look)
    yield from gpu_checks(run, gpus)
    if launched or run.accelerator == "cpu" or len(gpus) >= run.devices:
        where = "under the launcher" if launched else "here"
        yield from communication_checks(run, trial or start_here(run), where)


def _looks(run: PlannedRun, launched: Launched | None) -> dict[str, Callable[[], Check]]:
    return {
        "versions": check_versions,
        "cores": lambda: check_cores(run),
        "load": check_load,
        "memory": lambda: check_memory(run),
        "container": check_container,
        "kernel": check_kernel,
        "open files": lambda: check_descriptors(run),
        "/dev/shm": lambda: check_shm(run),
        "leftovers": check_leftovers,
        "loopback": check_loopback,
        "MASTER_PORT": lambda: check_meeting_place(launched),
        "interfaces": lambda: check_interfaces(run),
        "host name": lambda: check_host_name(run),
        "output": lambda: check_output(run),
        "data": lambda: check_data(run),
    }
