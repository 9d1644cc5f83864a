"""What a training step costs under each strategy.

    python benchmarks/step.py --ranks 2 --image-size 64 --batch-size 8

ResNet50 on random images that are in memory from the start, one thread per process, SGD with momentum. The processes
of all rows live side by side and take turns of a few steps, the others stopped: what slows the machine for a while hits
all rows alike. The first steps, and the first one of every turn, are left out. After the run the replicas must be equal
on all ranks, or the row has failed.

Rows: a bare loop with PyTorch's DDP (raw_ddp), the same with Accelerate (accelerate), and one and the same Lightning
loop with Lightning's DDP (ddp), the same in a process that keeps freed memory as gradsync's strategies do
(ddp_keeping_memory), with gradsync's strategies (manual_allreduce, sharded_server, parameter_server, the latter two
also with parameters that all share, and parameter_server with two servers and over TCP), with a parameter server as a
beginner writes it (naive) and without any exchange (no_communication), which is the ceiling; the ceiling of a process
that keeps freed memory is no_communication_keeping_memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from training_rows import Row, Workload

ROW_NAMES = (
    *("raw_ddp", "accelerate", "ddp", "ddp_keeping_memory", "manual_allreduce", "sharded_server"),
    "sharded_server_sharing",
    *("parameter_server", "parameter_server_sharing", "two_servers", "parameter_server_tcp", "naive"),
    *("no_communication", "no_communication_keeping_memory"),
)

_LAST_WORDS_S = 5.0
"""How long the other processes of a row may go on once one has failed or is late."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument(
        "--ranks", type=number, default=2, help="training processes; a server comes on top (%(default)s)"
    )
    parser.add_argument("--image-size", type=number, default=64, help="pixels, width and height (%(default)s)")
    parser.add_argument("--batch-size", type=number, default=8, help="images per training process (%(default)s)")
    parser.add_argument("--rounds", type=number, default=15, help="turns of every row (%(default)s)")
    parser.add_argument("--steps", type=number, default=3, help="steps timed per turn (%(default)s)")
    parser.add_argument("--warmup", type=number, default=4, help="steps before the first turn (%(default)s)")
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


class LiveRow:
    """One row in a group of processes that live as long as the benchmark and sleep while it is not their turn."""

    def __init__(self, row: Row, workload: Workload, ranks: int, timeout_s: float) -> None:
        self._row, self._workload, self._ranks, self._timeout_s = row, workload, ranks, timeout_s
        self._processes: harness.Processes | None = None

    def turn(self) -> harness.Metrics:
        """Let it train for one turn; means over ranks. Starts the group if there is none. Raises: RowFailed."""
        processes = self._processes or self._start()
        processes.send(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send(None)
        metrics = [self._receive(pipe) for pipe in self._pipes]
        processes.send(signal.SIGSTOP)  # else the threads of all backends wake up, a hundred times a second
        means = {name: statistics.fmean(values[name] for values in metrics) for name in metrics[0]}
        return {"images_per_s": 1000 * self._ranks * self._workload.batch_size / means["step_ms"], **means}

    def _start(self) -> harness.Processes:
        """Blocks until the warm-up is over."""
        pipes = [multiprocessing.Pipe() for _ in range(self._ranks)]
        self._pipes = [ours for ours, _ in pipes]
        theirs = [end for _, end in pipes]
        self._processes = harness.Processes(
            lambda process: self._row.run(process, self._workload, theirs), self._ranks + self._row.num_servers
        )
        for pipe in self._pipes:
            self._receive(pipe)
        return self._processes

    def _receive(self, pipe: Connection) -> Any:
        assert self._processes is not None
        deadline = time.monotonic() + self._timeout_s
        while not pipe.poll(0.2):
            if self._processes.one_has_failed() or time.monotonic() > deadline:
                self._processes.results(timeout_s=_LAST_WORDS_S)
        return pipe.recv()

    def fingerprints(self) -> set[str]:
        """Of the weights on all ranks after the last turn. Raises: RowFailed if they are not as they should be."""
        assert self._processes is not None
        self._processes.send(signal.SIGCONT)
        found = set(self._processes.results(self._timeout_s)[self._row.num_servers :])
        if self._row.synchronizes and len(found) > 1:
            raise harness.RowFailed(
                "the weights differ between ranks after the run: figures of a wrong result are none"
            )
        if not self._row.synchronizes and len(found) < self._ranks:
            raise harness.RowFailed("the ranks are to train apart, but some end with the same weights")
        return found

    def end(self) -> None:
        if self._processes is not None:
            self._processes.end()


def measure(live: dict[str, LiveRow], num_rounds: int) -> tuple[harness.Rounds, dict[str, set[str]]]:
    """All rounds, and the fingerprints of the weights of the rows that have not failed."""
    rounds = harness.Rounds({name: row.turn for name, row in live.items()}, "images_per_s")
    weights: dict[str, set[str]] = {}
    try:
        rounds.run(num_rounds)
        for name in live.keys() - rounds.failed.keys():
            try:
                weights[name] = live[name].fingerprints()
            except harness.RowFailed as error:
                rounds.failed[name] = str(error)
    finally:
        for row in live.values():
            row.end()
    return rounds, weights


def print_equality(weights: dict[str, set[str]]) -> None:
    """Which rows train exactly as DDP does; expected of all at 2 ranks, where sums have one order only."""
    if "ddp" in weights:
        equal = [name for name in weights if name != "ddp" and weights[name] == weights["ddp"]]
        print(f"Weights after the run equal those of ddp to the bit: {', '.join(equal) or 'no other row'}.")


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch and Lightning, once for all processes ...", flush=True)
    import training_rows

    from gradsync.callbacks import machine_environment

    workload = training_rows.Workload(
        arguments.arch,
        arguments.image_size,
        arguments.batch_size,
        arguments.warmup,
        turns=arguments.rounds,
        steps_per_turn=arguments.steps,
    )
    load_before, stolen = os.getloadavg()[0], harness.StolenTime()
    live = {
        name: LiveRow(training_rows.ROWS[name], workload, arguments.ranks, arguments.timeout_s)
        for name in arguments.rows
    }
    rounds, weights = measure(live, arguments.rounds)
    summary = rounds.summary(("ddp", "no_communication"), "images_per_s")
    environment = {**machine_environment(), "load_average_before": load_before, "stolen_pct": stolen.pct()}

    print()
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and above 1 is faster.")
    print_equality(weights)
    print(harness.load_line(environment))
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    return harness.conclude(
        "step", arguments, environment, summary, rounds.failed, optimizer="SGD, momentum 0.9, fused"
    )


if __name__ == "__main__":
    harness.run(main)
