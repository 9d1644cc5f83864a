"""What it costs to sum the gradients of a model over ranks, without any training around it.

    python benchmarks/sync.py --ranks 2

Buckets as DDP lays them out, filled anew before every measurement, one thread per process, gloo on loopback. All ranks
begin together, and the sum is checked. Every row runs in fresh processes in every round; rows take turns.

Rows: gloo's all-reduce in DDP's buckets, all started before the first is waited for (ddp), gloo's all-reduce of one
flat tensor (flat), and each algorithm of gradsync in DDP's buckets. hierarchical pretends that the ranks are on two
hosts. wall_ms is the time until a rank has the sum, cpu_ms the processor time of all its threads meanwhile, both the
mean over ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    from torch import Tensor

ALGORITHM_ROWS = ("naive", "native", "ring", "halving_doubling", "hierarchical", "shared_memory")
ROW_NAMES = ("ddp", "flat", *ALGORITHM_ROWS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--ranks", type=number, default=2, help="processes (%(default)s)")
    parser.add_argument("--arch", default="resnet50", help="a model of torchvision (%(default)s)")
    parser.add_argument("--rounds", type=number, default=5, help="how often every row is measured (%(default)s)")
    parser.add_argument("--sums", type=number, default=10, help="sums timed per round and row (%(default)s)")
    rows = harness.names_out_of(ROW_NAMES)
    parser.add_argument("--rows", type=rows, default=list(ROW_NAMES), help=f"some of {','.join(ROW_NAMES)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--timeout-s", type=number, default=300, help="give up a row after this long (%(default)s)")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("argument --ranks: must be >= 2, or there is nobody to communicate with")
    return arguments


def measure(name: str, parameters: list[Tensor], ranks: int, num_sums: int, timeout_s: float) -> harness.Metrics:
    """One row, once, in a group of fresh processes."""
    results = harness.run_processes(
        lambda process: _sum_repeatedly(name, parameters, process, num_sums), ranks, timeout_s
    )
    return {metric: statistics.fmean(result[metric] for result in results) for metric in results[0]}


def _sum_repeatedly(name: str, parameters: list[Tensor], process: harness.Process, num_sums: int) -> harness.Metrics:
    """The life of a rank: medians over sums, the first of which warms up."""
    import torch
    import torch.distributed as dist

    from gradsync.comm.buckets import BYTES_PER_MIB, BufferSpec, ddp_layout, make_buckets

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    algorithm = _algorithm(name, process.size)
    layout = [parameters] if name == "flat" else ddp_layout(parameters, 25 * BYTES_PER_MIB, BYTES_PER_MIB)
    buckets = make_buckets(layout, algorithm.allocate([BufferSpec.of(run) for run in layout]))
    samples = []
    for _ in range(num_sums + 1):
        for bucket in buckets:
            bucket.buffer().fill_(process.index + 1)
        dist.barrier()
        before = (time.perf_counter(), time.process_time())
        for future in [algorithm.start(bucket) for bucket in buckets]:
            future.wait()
        after = (time.perf_counter(), time.process_time())
        samples.append([1000 * (end - start) for start, end in zip(before, after, strict=True)])
        expected = process.size * (process.size + 1) / 2
        if any(bool((bucket.buffer() != expected).any()) for bucket in buckets):
            raise ArithmeticError("the sum is wrong")
        dist.barrier()
    wall_ms, cpu_ms = (statistics.median(column) for column in zip(*samples[1:], strict=True))
    return {"wall_ms": wall_ms, "cpu_ms": cpu_ms}


def _algorithm(name: str, ranks: int) -> Any:
    import torch.distributed as dist

    from gradsync.comm.algorithms import ALGORITHMS
    from gradsync.comm.algorithms.hierarchical import HierarchicalAllReduce

    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    if name == "hierarchical":
        return HierarchicalAllReduce(group, ["first" if rank < (ranks + 1) // 2 else "second" for rank in range(ranks)])
    return ALGORITHMS["native" if name in ("ddp", "flat") else name](group)


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch, once for all processes ...", flush=True)
    import torchvision

    import gradsync.comm  # noqa: F401 (for the processes)
    from gradsync.callbacks import machine_environment

    parameters = list(torchvision.models.get_model(arguments.arch).parameters())[::-1]
    megabytes = sum(p.nbytes for p in parameters) / 1e6

    def measurement(name: str) -> Any:
        return lambda: measure(name, parameters, arguments.ranks, arguments.sums, arguments.timeout_s)

    rounds = harness.Rounds({name: measurement(name) for name in arguments.rows}, "wall_ms")
    rounds.run(arguments.rounds)
    summary = rounds.summary_with_ratios("ddp", {"wall": "wall_ms", "cpu": "cpu_ms"})
    environment = machine_environment()
    print(f"\n{arguments.arch}: {megabytes:.0f} MB of gradients, {arguments.ranks} ranks\n")
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and below 1 is cheaper.")
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    return harness.conclude("sync", arguments, environment, summary, rounds.failed)


if __name__ == "__main__":
    harness.run(main)
