"""What it costs to watch a training: the callbacks and timers that `gradsync fit` has on by default.

    python benchmarks/monitor.py --ranks 2 --image-size 64 --batch-size 8

Every strategy trains with all of them, to TensorBoard and to a result file, with every step recorded for a trace as
well (_traced), with the guards against faults alone (_guarded), and without any; rows take turns as in `step.py`. The
time within hooks and timers is measured directly (observing_ms, share_pct of a step), which is exact to microseconds
where the ratio of images/s drowns in noise; that ratio stands beside it. Ranks exchange three numbers where figures are
logged, every 10 steps: waiting for the slower rank there is counted as observing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import harness
from step import LiveRow, measure

STRATEGY_NAMES = ("ddp", "manual_allreduce", "sharded_server", "parameter_server")

HOWS = ("traced", "guarded", "unobserved")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--ranks", type=number, default=2, help="training processes (%(default)s)")
    parser.add_argument("--image-size", type=number, default=64, help="pixels, width and height (%(default)s)")
    parser.add_argument("--batch-size", type=number, default=8, help="images per training process (%(default)s)")
    parser.add_argument("--rounds", type=number, default=7, help="turns of every row (%(default)s)")
    parser.add_argument("--steps", type=number, default=10, help="steps timed per turn (%(default)s)")
    parser.add_argument("--warmup", type=number, default=4, help="steps before the first turn (%(default)s)")
    names = harness.names_out_of(STRATEGY_NAMES)
    parser.add_argument("--strategies", type=names, default=list(STRATEGY_NAMES), help="(all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--timeout-s", type=number, default=600, help="give up a row after this long (%(default)s)")
    parser.add_argument("--arch", default="resnet50", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("argument --ranks: must be >= 2, or there is no communication to watch")
    return arguments


def tabulate(rounds: harness.Rounds, strategies: list[str]) -> harness.Summary:
    """Per watched row: what watching takes of a step, and images/s against those of the row that nobody watches."""
    summary: harness.Summary = {}
    for strategy in strategies:
        base = f"{strategy}_unobserved"
        values = rounds.summary((base,), "images_per_s")
        for name in (strategy, f"{strategy}_traced", f"{strategy}_guarded"):
            if name in values and base in values:
                summary[name] = _row(values[name], values[name][f"ratio_to_{base}"])
    return summary


def _row(values: dict[str, dict[str, float]], ratio: dict[str, float]) -> dict[str, dict[str, float]]:
    step_ms = values["step_ms"]["median"]
    share = {key: 100 * value / step_ms for key, value in values["observing_ms"].items()}
    kept = {key: values[key] for key in ("images_per_s", "step_ms", "observing_ms")}
    return {**kept, "share_pct": share, "ratio_to_unobserved": ratio}


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch and Lightning, once for all processes ...", flush=True)
    import monitor_rows
    import training_rows

    from gradsync.callbacks import machine_environment

    sizes = (arguments.image_size, arguments.batch_size, arguments.warmup)
    workload = training_rows.Workload(arguments.arch, *sizes, arguments.rounds, arguments.steps)
    load_before, stolen = os.getloadavg()[0], harness.StolenTime()
    live = {
        name: LiveRow(row, workload, arguments.ranks, arguments.timeout_s)
        for name, row in monitor_rows.rows().items()
        if any(name in (s, *(f"{s}_{how}" for how in HOWS)) for s in arguments.strategies)
    }
    rounds, _ = measure(live, arguments.rounds)
    environment = {**machine_environment(), "load_average_before": load_before, "stolen_pct": stolen.pct()}
    summary = tabulate(rounds, arguments.strategies)
    print()
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and below 1 is slower.")
    print(harness.load_line(environment))
    return harness.conclude("monitor", arguments, environment, summary, rounds.failed)


if __name__ == "__main__":
    harness.run(main)
