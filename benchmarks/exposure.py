"""Is *exposed* what training waits for? Against the wall clock, with and without the exchange.

    python benchmarks/exposure.py --ranks 2 --markdown docs/figures.md

A network that computes little and communicates much (24 layers of 4 MiB) trains under every strategy, and in rows that
leave only the exchange out: DDP with a hook that hands its gradients back, a process that trains alone for the others.
The difference of the steps' wall times, the optimizer's time left out on both sides, is what communication really
costs. Without overlap *exposed* must agree with it. With overlap the difference is more: communication also takes
processor time from the backward pass beside it. That remainder is *contention*.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import harness
from step import LiveRow

_MARKS = ("<!-- exposure table: benchmarks/exposure.py writes it -->", "<!-- end of exposure table -->")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--ranks", type=number, default=2, help="training processes (%(default)s)")
    parser.add_argument("--layers", type=number, default=24, help="of 4 MiB each (%(default)s)")
    parser.add_argument("--batch-size", type=number, default=16, help="points per training process (%(default)s)")
    parser.add_argument("--rounds", type=number, default=9, help="turns of every row (%(default)s)")
    parser.add_argument("--steps", type=number, default=10, help="steps timed per turn (%(default)s)")
    parser.add_argument("--warmup", type=number, default=6, help="steps before the first turn (%(default)s)")
    parser.add_argument("--rows", default=None, help="some rows, with commas (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table into this page")
    parser.add_argument("--timeout-s", type=number, default=600, help="give up a row after this long (%(default)s)")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("argument --ranks: must be >= 2, or there is nobody to communicate with")
    return arguments


def tabulate(rounds: harness.Rounds, pairs: dict[str, str]) -> harness.Summary:
    """Per row: what is exposed, what the wall clock says, and the rest."""
    samples, summary = rounds.summary(), {}
    for name, base in pairs.items():
        if name in samples and base in samples:
            cost = rounds.differences(name, base, lambda sample: sample["step_ms"] - sample["optimizer_ms"])
            rest = rounds.differences(name, base, _unexplained)
            exposed = samples[name]["exposed_ms"]
            summary[name] = {"exposed_ms": exposed, "wall_difference_ms": cost, "remainder_ms": rest}
    return summary


def _unexplained(sample: harness.Metrics) -> float:
    """Without an exchange nothing is exposed but what DDP's own motions take."""
    return sample["step_ms"] - sample["optimizer_ms"] - sample["exposed_ms"]


def markdown(summary: harness.Summary, arguments: argparse.Namespace, environment: dict[str, Any]) -> str:
    lines = ["| row | exposed, ms | wall difference, ms | remainder, ms |", "|---|---|---|---|"]
    for name, row in summary.items():
        exposed, cost, rest = (row[key]["median"] for key in ("exposed_ms", "wall_difference_ms", "remainder_ms"))
        lines.append(f"| `{name}` | {exposed:.1f} | {cost:.1f} | {rest:+.1f} |")
    lines += ["", f"{arguments.ranks} processes, {arguments.layers} layers of 4 MiB, medians of {arguments.rounds} "]
    lines[-1] += f"turns of {arguments.steps} steps; {environment['cpu_count']} cores, torch {environment['torch']}."
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch and Lightning, once for all processes ...", flush=True)
    import exposure_rows

    from gradsync.callbacks import machine_environment

    counts = (arguments.layers, arguments.batch_size, arguments.warmup, arguments.rounds, arguments.steps)
    workload = exposure_rows.WideWorkload("linear", *counts)
    known = exposure_rows.rows()
    chosen = arguments.rows.split(",") if arguments.rows else list(known)
    if unknown := [name for name in chosen if name not in known]:
        print(f"argument --rows: there is no {unknown[0]!r}; there are {', '.join(known)}")
        return 2
    pairs = {name: known[name][1] for name in chosen}
    alone = {name: row for name, row in exposure_rows.no_op_rows().items() if name in pairs.values()}
    made = {**{name: known[name][0] for name in chosen}, **alone}
    load_before, stolen = os.getloadavg()[0], harness.StolenTime()
    live = {name: LiveRow(row, workload, arguments.ranks, arguments.timeout_s) for name, row in made.items()}
    rounds = harness.Rounds({name: row.turn for name, row in live.items()}, "step_ms")
    try:
        rounds.run(arguments.rounds)
    finally:
        for row in live.values():
            row.end()
    environment = {**machine_environment(), "load_average_before": load_before, "stolen_pct": stolen.pct()}
    summary = tabulate(rounds, pairs)
    print()
    harness.print_table(summary)
    print("\nMedians over rounds. Without overlap the remainder should be small; with it, it is contention.")
    print(harness.load_line(environment))
    if arguments.markdown:
        harness.put_into(arguments.markdown, _MARKS, markdown(summary, arguments, environment))
    return harness.conclude("exposure", arguments, environment, summary, rounds.failed)


if __name__ == "__main__":
    harness.run(main)
