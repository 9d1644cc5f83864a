"""What it brings not to wait for a slow worker, and what that costs in accuracy.

    python benchmarks/staleness.py speed --slowness 5
    python benchmarks/staleness.py accuracy --markdown docs/strategies.md

Rows of both: the modes of the parameter server: sync, bounded (at most 4 steps ahead of the slowest) and async. The
last worker is slow: it sleeps after every backward pass. Forward and backward pass are timed once before all runs, in a
process that has the machine for itself; with the sleep they take --slowness times that.

speed counts updates of the parameters while all workers train. Mind what an update is: in sync mode it is one step by
the average of all workers' gradients, in the others one step by one worker's gradient. samples_per_s counts the images
behind the updates, and so compares work done; staleness is the mean number of other updates that came between a
worker's parameters and its gradient. Bounded lets the others run ahead once, by as many steps as the bound says; from
then on all go at the pace of the slowest.

accuracy trains with equal samples in all modes, several times, on the bundled images. Steps of async and bounded use
one worker's batch, and there are as many more of them as there are workers: by default their learning rate is that of
sync divided by the number of workers. In sync mode nobody sleeps: it would change nothing but the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "bounded": {"mode": "bounded", "staleness": 4},
    "async": {"mode": "async"},
}
_MARKS = {
    name: (f"<!-- staleness {name} table: benchmarks/staleness.py writes it -->", f"<!-- end of {name} table -->")
    for name in ("speed", "accuracy")
}


def positive_float(text: str) -> float:
    """For argparse. Raises: ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    number = harness.positive_int
    speed = commands.add_parser("speed", help="updates per second with one slow worker")
    accuracy = commands.add_parser("accuracy", help="top-1 after equal samples")
    for command, slowness in ((speed, 5.0), (accuracy, 2.0)):
        add = command.add_argument
        add("--workers", type=number, default=2, help="training processes; a server comes on top (%(default)s)")
        add("--slowness", type=positive_float, default=slowness, help="of the last worker (%(default)g)")
        add("--arch", default="resnet18", help="a model of torchvision (%(default)s)")
        add("--batch-size", type=number, default=16, help="images per worker and step (%(default)s)")
        add("--json", type=Path, metavar="FILE", help="write the result there, too")
        add("--markdown", type=Path, metavar="PAGE", help="put the table between this page's two marks")
        add("--timeout-s", type=number, default=900, help="give up a run after this long (%(default)s)")
    speed.add_argument("--rounds", type=number, default=3, help="how often every mode is measured (%(default)s)")
    speed.add_argument("--steps", type=number, default=60, help="of every worker, in a round (%(default)s)")
    speed.add_argument("--warmup", type=number, default=3, help="steps before those, none of them slow (%(default)s)")
    accuracy.add_argument("--seeds", type=number, default=3, help="runs per mode (%(default)s)")
    accuracy.add_argument("--epochs", type=number, default=4, help="(%(default)s)")
    accuracy.add_argument("--limit-batches", type=number, help="batches per epoch and worker (all)")
    accuracy.add_argument("--lr", type=positive_float, default=1e-3, help="of AdamW in sync mode (%(default)g)")
    accuracy.add_argument("--lr-factor", type=positive_float, help="of async and bounded, times --lr (1 / workers)")
    arguments = parser.parse_args()
    if arguments.workers < 2:
        parser.error("argument --workers: must be >= 2, or there is nobody to wait for")
    if arguments.slowness < 1:
        parser.error(f"argument --slowness: must be >= 1, got {arguments.slowness:g}")
    return arguments


# -- speed -----------------------------------------------------------------------------------------------------


def sleep_of(arguments: argparse.Namespace) -> float:
    """Of the slow worker in every step, in seconds."""
    import staleness_runs

    [compute_s] = harness.run_processes(
        lambda process: staleness_runs.compute_s(arguments.arch, arguments.batch_size), 1, arguments.timeout_s
    )
    sleep_s = (arguments.slowness - 1) * compute_s
    print(f"Forward and backward pass: {1000 * compute_s:.0f} ms. The slow worker sleeps {1000 * sleep_s:.0f} ms more.")
    return sleep_s


def measure_speed(name: str, sleep_s: float, arguments: argparse.Namespace) -> harness.Metrics:
    """One mode, once, in fresh processes. Raises: RowFailed."""
    import staleness_runs

    plan = staleness_runs.Speed(
        MODES[name], arguments.arch, arguments.batch_size, arguments.warmup, arguments.steps, sleep_s
    )
    _, *workers = harness.run_processes(plan.run, 1 + arguments.workers, arguments.timeout_s)
    started = max(worker["at_ends"][arguments.warmup] for worker in workers)
    ended = min(worker["at_ends"][-1] for worker in workers)
    if started >= ended:
        raise harness.RowFailed("the fastest worker had ended when the slowest began: give more --steps")
    seen = [
        staleness
        for worker in workers
        for at_end, staleness in zip(worker["at_ends"], worker["staleness"], strict=True)
        if started < at_end <= ended
    ]
    num_updates = len(seen) / (arguments.workers if name == "sync" else 1)
    return {
        "updates_per_s": num_updates / (ended - started),
        "samples_per_s": len(seen) * arguments.batch_size / (ended - started),
        "staleness": statistics.fmean(seen),
    }


def speed_table(summary: harness.Summary, about: str) -> str:
    lines = ["| mode | updates/s | times sync | images/s | times sync | mean staleness |", "|---|---|---|---|---|---|"]
    for name, values in summary.items():
        medians = [values[m]["median"] if m in values else float("nan") for m in _SPEED_COLUMNS]
        lines.append("| `{}` | {:.1f} | {:.2f} | {:.0f} | {:.2f} | {:.1f} |".format(name, *medians))
    return "\n".join([*lines, "", about])


_SPEED_COLUMNS = (
    *("updates_per_s", "updates_ratio_to_sync", "samples_per_s", "samples_ratio_to_sync"),
    "staleness",
)


def speed(arguments: argparse.Namespace, environment: dict[str, Any]) -> int:
    load_before, stolen, sleep_s = os.getloadavg()[0], harness.StolenTime(), sleep_of(arguments)
    rounds = harness.Rounds({name: _later(measure_speed, name, sleep_s, arguments) for name in MODES}, "updates_per_s")
    rounds.run(arguments.rounds)
    summary = rounds.summary_with_ratios("sync", {"updates": "updates_per_s", "samples": "samples_per_s"})
    environment |= {"load_average_before": load_before, "stolen_pct": stolen.pct()}
    print()
    harness.print_table(summary)
    print("\nMedian (min - max) over rounds; a ratio is taken within a round, and above 1 is faster.")
    print("An update of sync is a step by all workers' gradients, one of bounded or async a step by one worker's.")
    print(harness.load_line(environment))
    about = (
        f"{arguments.arch}, random images of 32 pixels, {arguments.workers} workers with {arguments.batch_size} images "
        f"per step, one of which takes {arguments.slowness:g} times as long; medians of {arguments.rounds} interleaved "
        f"rounds of {arguments.steps} steps per worker; {_machine(environment)}. An update of `sync` is a step by all "
        "workers' gradients, one of `bounded` or `async` a step by one worker's."
    )
    if arguments.markdown:
        harness.put_into(arguments.markdown, _MARKS["speed"], speed_table(summary, about))
    return harness.conclude("staleness_speed", arguments, environment, summary, rounds.failed, sleep_s=sleep_s)


# -- accuracy --------------------------------------------------------------------------------------------------


def train(name: str, seed: int, sleep_s: float, arguments: argparse.Namespace) -> harness.Metrics:
    """One run of one mode. Raises: RowFailed."""
    import staleness_runs

    is_sync = name == "sync"
    plan = staleness_runs.Accuracy(
        MODES[name],
        arguments.arch,
        arguments.batch_size,
        arguments.epochs,
        arguments.limit_batches,
        lr=arguments.lr * (1.0 if is_sync else arguments.lr_factor),
        sleep_s=0.0 if is_sync else sleep_s,
        seed=seed,
    )
    _, *workers = harness.run_processes(plan.run, 1 + arguments.workers, arguments.timeout_s)
    return {
        "top1_pct": workers[0]["top1_pct"],
        "staleness": statistics.fmean(worker["staleness"] for worker in workers),
    }


def accuracy_table(runs: dict[str, list[harness.Metrics]], about: str) -> str:
    lines = ["| mode | best top-1, mean (min to max) | against sync, points | mean staleness |", "|---|---|---|---|"]
    means = {name: statistics.fmean(r["top1_pct"] for r in rounds) for name, rounds in runs.items()}
    for name, rounds in runs.items():
        found = [r["top1_pct"] for r in rounds]
        difference = f"{means[name] - means['sync']:+.1f}" if "sync" in means else "-"
        staleness = statistics.fmean(r["staleness"] for r in rounds)
        top1 = f"{means[name]:.1f} % ({min(found):.1f} to {max(found):.1f})"
        lines.append(f"| `{name}` | {top1} | {difference} | {staleness:.1f} |")
    return "\n".join([*lines, "", about])


def accuracy(arguments: argparse.Namespace, environment: dict[str, Any]) -> int:
    arguments.lr_factor = arguments.lr_factor or 1.0 / arguments.workers
    sleep_s = sleep_of(arguments)
    runs: dict[str, list[harness.Metrics]] = {name: [] for name in MODES}

    def one_run(name: str) -> harness.Metrics:
        runs[name].append(train(name, 1 + len(runs[name]), sleep_s, arguments))
        return runs[name][-1]

    rounds = harness.Rounds({name: _later(one_run, name) for name in MODES}, "top1_pct")
    rounds.run(arguments.seeds)
    about = (
        f"{arguments.arch}, bundled images, {arguments.epochs} epochs, {arguments.workers} workers with "
        f"{arguments.batch_size} images per step, {arguments.seeds} seeds; {_machine(environment)}. AdamW at "
        f"{arguments.lr:g} in `sync`; in `bounded` and `async` times {arguments.lr_factor:g}, since each of their "
        f"steps is by one worker's batch, and there are {arguments.workers} times as many. There one worker takes "
        f"{arguments.slowness:g} times as long; in `sync` that would change nothing but the time."
    )
    complete = {name: found for name, found in runs.items() if name not in rounds.failed and found}
    table = accuracy_table(complete, about)
    print(f"\n{table}")
    if arguments.markdown:
        harness.put_into(arguments.markdown, _MARKS["accuracy"], table)
    return harness.conclude(
        "staleness_accuracy", arguments, environment, rounds.summary(), rounds.failed, sleep_s=sleep_s
    )


def _later(function: Callable[..., harness.Metrics], *arguments: Any) -> Callable[[], harness.Metrics]:
    return lambda: function(*arguments)


def _machine(environment: dict[str, Any]) -> str:
    return f"one host with {environment['cpu_count']} cores, torch {environment['torch']}"


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    print("Loading torch and Lightning, once for all processes ...", flush=True)
    import staleness_runs  # noqa: F401 (for the processes)

    from gradsync.callbacks import machine_environment

    return {"speed": speed, "accuracy": accuracy}[arguments.command](arguments, machine_environment())


if __name__ == "__main__":
    harness.run(main)
