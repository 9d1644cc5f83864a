"""What a training step costs under each strategy.

    python benchmarks/step.py --ranks 2 --image-size 64 --batch-size 8

ResNet50 on random images that are in memory from the start, one thread per process, SGD with momentum. Every row runs
in fresh processes in every round; rows take turns. The first steps are left out. After the run the replicas must be
equal on all ranks, or the row has failed.

Rows: a bare loop with PyTorch's DDP (raw_ddp), the same with Accelerate (accelerate), and one and the same Lightning
loop with Lightning's DDP (ddp), the same in a process that keeps freed memory as gradsync's strategies do
(ddp_keeping_memory), with gradsync's strategies (manual_allreduce, parameter_server), with a parameter server as a
beginner writes it (naive) and without any exchange (no_communication), which is the ceiling.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    from training_rows import Row, Workload

ROW_NAMES = (
    *("raw_ddp", "accelerate", "ddp", "ddp_keeping_memory", "manual_allreduce"),
    *("parameter_server", "naive", "no_communication"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument(
        "--ranks", type=number, default=2, help="training processes; a server comes on top (%(default)s)"
    )
    parser.add_argument("--image-size", type=number, default=64, help="pixels, width and height (%(default)s)")
    parser.add_argument("--batch-size", type=number, default=8, help="images per training process (%(default)s)")
    parser.add_argument("--rounds", type=number, default=5, help="how often every row is measured (%(default)s)")
    parser.add_argument("--steps", type=number, default=8, help="steps timed per round and row (%(default)s)")
    parser.add_argument("--warmup", type=number, default=3, help="steps before them (%(default)s)")
    rows = harness.names_out_of(ROW_NAMES)
    parser.add_argument("--rows", type=rows, default=list(ROW_NAMES), help=f"some of {','.join(ROW_NAMES)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--timeout-s", type=number, default=600, help="give up a row after this long (%(default)s)")
    parser.add_argument("--arch", default="resnet50", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("argument --ranks: must be >= 2, or there is nobody to communicate with")
    if "accelerate" in arguments.rows and importlib.util.find_spec("accelerate") is None:
        parser.error("argument --rows: accelerate is not installed: pip install accelerate, or choose other rows")
    return arguments


def measure(row: Row, workload: Workload, ranks: int, timeout_s: float, weights: set[str]) -> harness.Metrics:
    """One row, once, in a group of fresh processes. Adds the weights' fingerprint to `weights`."""
    barrier = multiprocessing.get_context("fork").Barrier(ranks)

    def work(process: harness.Process) -> Any:
        return row.run(process, workload, barrier)

    results = harness.run_processes(work, ranks + row.num_servers, timeout_s)[row.num_servers :]
    fingerprints = {result["fingerprint"] for result in results}
    if row.synchronizes and len(fingerprints) > 1:
        raise harness.RowFailed("the weights differ between ranks after the run: figures of a wrong result are none")
    if not row.synchronizes and len(fingerprints) < ranks:
        raise harness.RowFailed("the ranks are to train apart, but some end with the same weights")
    weights |= fingerprints
    names = results[0]["metrics"]
    means = {name: statistics.fmean(result["metrics"][name] for result in results) for name in names}
    return {"images_per_s": 1000 * ranks * workload.batch_size / means["step_ms"], **means}


def print_equality(weights: dict[str, set[str]], failed: dict[str, str]) -> None:
    """Which rows train exactly as DDP does; expected of all at 2 ranks, where sums have one order only."""
    if weights.get("ddp") and "ddp" not in failed:
        equal = [name for name in weights if name != "ddp" and weights[name] == weights["ddp"]]
        print(f"Weights after the run equal those of ddp to the bit: {', '.join(equal) or 'no other row'}.")


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch and Lightning, once for all processes ...", flush=True)
    import training_rows

    from gradsync.callbacks import machine_environment

    workload = training_rows.Workload(
        arguments.arch, arguments.image_size, arguments.batch_size, arguments.warmup, arguments.steps
    )
    weights: dict[str, set[str]] = {name: set() for name in arguments.rows}

    def measurement(name: str) -> Any:
        row = training_rows.ROWS[name]
        return lambda: measure(row, workload, arguments.ranks, arguments.timeout_s, weights[name])

    load_before = os.getloadavg()[0]
    rounds = harness.Rounds({name: measurement(name) for name in arguments.rows}, "images_per_s")
    rounds.run(arguments.rounds)
    summary = rounds.summary(("ddp", "no_communication"), "images_per_s")
    environment = {**machine_environment(), "load_average": [load_before, os.getloadavg()[0]]}

    print()
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and above 1 is faster.")
    print_equality(weights, rounds.failed)
    print(
        "Load of the machine in the last minute, before and after: {:.1f}, {:.1f}".format(*environment["load_average"])
    )
    print(", ".join(f"{key} {value}" for key, value in environment.items() if key != "load_average"))
    return harness.conclude(
        "step", arguments, environment, summary, rounds.failed, optimizer="SGD, momentum 0.9, fused"
    )


if __name__ == "__main__":
    harness.run(main)
