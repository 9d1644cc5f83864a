"""What communication hooks save and cost: bytes, speed and accuracy after equal epochs.

    python benchmarks/hooks.py --markdown docs/algorithms.md

Trains ResNet18 on the bundled images once per hook, with `gradsync fit`, one after the other, and prints a table.
Rows: no hook, and gradsync's names for hooks with the options that the table states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

HOOKS: dict[str, list[str]] = {
    "none": [],
    "bf16": ["comm_hook", "bf16"],
    "powersgd, rank 4": [
        *("comm_hook", "powersgd"),
        *("comm_state.matrix_approximation_rank", "4", "comm_state.start_powerSGD_iter", "10"),
    ],
    "int8": ["comm_hook", "int8"],
    "top_k, 1 %": ["comm_hook", "top_k", "comm_state.share", "0.01"],
}
_MARKS = ("<!-- hooks table: benchmarks/hooks.py writes it -->", "<!-- end of hooks table -->")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = harness.positive_int
    parser.add_argument("--ranks", type=number, default=2, help="training processes (%(default)s)")
    parser.add_argument("--arch", default="resnet18", help="a model of torchvision (%(default)s)")
    parser.add_argument("--epochs", type=number, default=3, help="(%(default)s)")
    parser.add_argument("--limit-batches", type=number, help="batches per epoch and rank (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="put the table between this page's two marks")
    return parser.parse_args()


def train(options: list[str], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One fit; what its result file says. Raises: RowFailed."""
    flags = [f"--trainer.strategy.{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    if arguments.limit_batches:
        flags += [f"--trainer.limit_{stage}_batches={arguments.limit_batches}" for stage in ("train", "val")]
    results = folder / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gradsync", "fit", "--config", "configs/recipe/demo.yaml"),
            *("--model.arch", arguments.arch, "--trainer.max_epochs", str(arguments.epochs)),
            *("--trainer.devices", str(arguments.ranks), "--trainer.strategy", "manual_allreduce", *flags),
            *("--results", str(results), "--run_dir", str(folder / "run")),
        ],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise harness.RowFailed((done.stderr or done.stdout).strip().splitlines()[-1])
    return json.loads(results.read_text())


def row(result: dict[str, Any]) -> dict[str, float]:
    summary, comm = result["summary"], result["comm"]
    return {
        "mb_per_step": comm["bytes_per_step"] / 1e6,
        "exposed_ms": comm["exposed_ms"],
        "images_per_s": summary["avg_train_throughput"],
        "top1_pct": summary["best_val_accuracy"],
    }


def markdown(rows: dict[str, dict[str, float]], about: str) -> str:
    lines = [
        "| hook | MB per step and rank | exposed, ms | images/s | best top-1 |",
        "|---|---|---|---|---|",
        *(
            "| {} | {mb_per_step:.1f} | {exposed_ms:.0f} | {images_per_s:.1f} | {top1_pct:.1f} % |".format(
                name, **values
            )
            for name, values in rows.items()
        ),
    ]
    return "\n".join([*lines, "", about])


def main() -> int:
    arguments = parse_arguments()
    rows: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    started = time.monotonic()
    for number, (name, options) in enumerate(HOOKS.items()):
        try:
            with tempfile.TemporaryDirectory(prefix="gradsync-hooks-") as folder:
                rows[name] = row(train(options, arguments, Path(folder)))
            text = f"{rows[name]['images_per_s']:.1f} images/s, top-1 {rows[name]['top1_pct']:.1f} %"
        except harness.RowFailed as error:
            failed[name] = str(error)
            text = f"FAILED: {error}"
        left_s = (time.monotonic() - started) / (number + 1) * (len(HOOKS) - number - 1)
        print(f"{name}: {text} | {left_s:.0f} s left", flush=True)

    from gradsync.callbacks import machine_environment

    environment = machine_environment()
    about = (
        f"{arguments.arch}, bundled images, {arguments.epochs} epochs, {arguments.ranks} ranks on one host with "
        f"{environment['cpu_count']} cores, torch {environment['torch']}. Bytes are sent plus received."
    )
    table = markdown(rows, about)
    print(f"\n{table}")
    if arguments.markdown:
        harness.put_into(arguments.markdown, _MARKS, table)
    return harness.conclude("hooks", arguments, environment, rows, failed)


if __name__ == "__main__":
    harness.run(main)
