"""What it costs to give a server all gradients and to get all parameters back, without any training around it.

    python benchmarks/server.py

One worker pushes the gradients of a model, the server steps (SGD with momentum, fused), the worker pulls the
parameters. Gradients are new before every measurement, one thread per process; both processes keep freed memory, as
gradsync's strategies do by default. Every row runs in fresh processes in every round; rows take turns. In the end the
worker's parameters must equal those of an optimizer of its own to the bit, or the row has failed.

Rows: one plain TCP socket on loopback, which moves the gradients as one block, steps, and moves the parameters as one
block (raw_tcp), gradsync's server and client over ZeroMQ's TCP and Unix sockets (tcp, ipc) and through shared memory
(shared_memory), all with the strategy's default part sizes, and the server as a beginner writes it (naive). raw_tcp
finds its gradients in one block; the other rows find them one by one, as a backward pass leaves them.

wall_ms is the time on the worker from its first byte to its last parameter, worker_cpu_ms its processor time meanwhile,
server_cpu_ms that of the server per step, cpu_ms both together; medians over steps.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    from server_rows import Workload

ROW_NAMES = ("raw_tcp", "tcp", "ipc", "shared_memory", "naive")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--arch", default="resnet50", help="a model of torchvision (%(default)s)")
    parser.add_argument("--rounds", type=number, default=5, help="how often every row is measured (%(default)s)")
    parser.add_argument("--steps", type=number, default=10, help="steps timed per round and row (%(default)s)")
    rows = harness.names_out_of(ROW_NAMES)
    parser.add_argument("--rows", type=rows, default=list(ROW_NAMES), help=f"some of {','.join(ROW_NAMES)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--timeout-s", type=number, default=300, help="give up a row after this long (%(default)s)")
    return parser.parse_args()


def measure(name: str, workload: Workload, timeout_s: float) -> harness.Metrics:
    """One row, once, in two fresh processes. Raises: RowFailed."""
    import server_rows

    row = server_rows.ROWS[name]
    served, worked = harness.run_processes(lambda process: row.run(process, workload), 2, timeout_s)
    return {
        "wall_ms": worked["wall_ms"],
        "cpu_ms": served["cpu_ms"] + worked["cpu_ms"],
        "worker_cpu_ms": worked["cpu_ms"],
        "server_cpu_ms": served["cpu_ms"],
    }


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch, once for all processes ...", flush=True)
    import server_rows

    from gradsync.callbacks import machine_environment

    workload = server_rows.Workload.of(arguments.arch, arguments.steps, arguments.timeout_s)

    def measurement(name: str) -> Any:
        return lambda: measure(name, workload, arguments.timeout_s)

    load_before, stolen = os.getloadavg()[0], harness.StolenTime()
    rounds = harness.Rounds({name: measurement(name) for name in arguments.rows}, "wall_ms")
    rounds.run(arguments.rounds)
    summary = rounds.summary_with_ratios("raw_tcp", {"wall": "wall_ms", "cpu": "cpu_ms"})
    environment = {**machine_environment(), "load_average_before": load_before, "stolen_pct": stolen.pct()}
    print(f"\n{arguments.arch}: {workload.num_bytes / 1e6:.0f} MB of gradients, 1 server, 1 worker\n")
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and below 1 is cheaper.")
    print(f"Parameters equal to those of a local optimizer, to the bit: {', '.join(summary) or 'no row'}.")
    print(harness.load_line(environment))
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    return harness.conclude(
        "server", arguments, environment, summary, rounds.failed, optimizer="SGD, momentum 0.9, fused"
    )


if __name__ == "__main__":
    harness.run(main)
