"""Results as a comparison writes them, made up: what the report's tests read. No test in here."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from gradsync.report.methods import method_of, result_filename, result_stem

ORIGINAL_KEYS = (
    "method",
    "world_size",
    "batch_size",
    "num_workers",
    "start_time",
    "end_time",
    "epochs",
    "summary",
    "all_losses",
)
"""What files of the original experiment hold."""

_THROUGHPUT = {"ddp": 410.0, "manual_allreduce": 432.0, "parameter_server": 351.0}
_EXPOSED_SHARE = {"ddp": 0.22, "manual_allreduce": 0.18, "parameter_server": 0.34}


def make_result(
    strategy: str = "ddp",
    *,
    variant: str = "",
    training_processes: int = 2,
    epochs: int = 3,
    steps_per_epoch: int = 50,
    throughput: float | None = None,
    loss_seed: int = 0,
    loss_shift: float = 0.0,
    repeat: int = 1,
    batch_size: int = 16,
    **changes: Any,
) -> dict[str, Any]:
    """One run's file with every key. The same `loss_seed` gives the same losses whatever the strategy."""
    noise = random.Random(f"{strategy} {repeat} {training_processes}")
    rate = throughput or _THROUGHPUT.get(strategy, 380.0) * (training_processes / 2) ** 0.9
    rate *= noise.uniform(0.98, 1.02) if repeat > 1 else 1.0
    losses = make_losses(epochs * steps_per_epoch, seed=loss_seed, shift=loss_shift)
    server = strategy == "parameter_server"
    comm = make_comm(strategy, step_ms=1000 * batch_size * training_processes / rate)
    records = [
        _epoch(number, losses[(number - 1) * steps_per_epoch : number * steps_per_epoch], epochs, rate, comm)
        for number in range(1, epochs + 1)
    ]
    result = {
        "schema_version": 1,
        "method": method_of(strategy, variant).name,
        "strategy": strategy,
        **({"variant": variant} if variant else {}),
        "world_size": training_processes + server,
        "batch_size": batch_size,
        "global_batch_size": batch_size * training_processes,
        **({"num_workers": training_processes} if server else {}),
        "start_time": "2025-03-01 10:00:00",
        "end_time": "2025-03-01 10:04:30",
        "warmup_steps": 5,
        "data": "bundled Fashion-MNIST subset (demo data, 10 classes): 1600 train, 400 val images of 32x32",
        "demo_data": True,
        "complete": True,
        "epochs": records,
        "summary": _summary(records),
        "all_losses": losses,
        "comm": comm,
        "environment": make_environment(strategy),
        "config": make_config(strategy, epochs, batch_size),
    }
    return result | changes


def make_losses(steps: int, *, seed: int = 0, shift: float = 0.0) -> list[float]:
    """A curve that falls from 2.4 towards 0.7, with the scatter of small batches."""
    noise = random.Random(seed)
    return [0.7 + 1.7 * math.exp(-3 * step / max(1, steps)) + shift + noise.gauss(0, 0.08) for step in range(steps)]


def make_comm(strategy: str, step_ms: float) -> dict[str, Any]:
    """The figures of an average step, which add up to `step_ms`."""
    exposed = step_ms * _EXPOSED_SHARE.get(strategy, 0.2)
    server = strategy == "parameter_server"
    total = exposed * (1.1 if server else 1.9)
    data, optimizer, other = step_ms * 0.03, step_ms * 0.05, step_ms * 0.01
    return {
        "step_ms": step_ms,
        "data_ms": data,
        "compute_ms": step_ms - exposed - data - optimizer - other,
        "optimizer_ms": optimizer,
        "other_ms": other,
        "total_ms": total,
        "exposed_ms": exposed,
        "overlapped_ms": total - exposed,
        "share_pct": 100 * exposed / step_ms,
        "bytes_per_step": 188_000_000,
        "push_ms": total * 0.4 if server else None,
        "pull_ms": total * 0.45 if server else None,
        "wait_ms": total * 0.15 if server else None,
        "total_is_upper_bound": strategy == "ddp",
    }


def make_environment(strategy: str) -> dict[str, Any]:
    return {
        "python": "3.11.9",
        "torch": "2.14.1",
        "lightning": "2.6.6",
        "gradsync": "0.1.0",
        "platform": "Linux-6.8-x86_64",
        "cpu_model": "Example CPU",
        "cpu_count": 4,
        "backend": "gloo",
        "accelerator": "cpu",
        "omp_num_threads": 1,
        "strategy_options": {"bucket_mib": 25} if strategy == "manual_allreduce" else {},
        "seed": 42,
        "commit": None,
    }


def make_config(strategy: str, epochs: int, batch_size: int) -> dict[str, Any]:
    return {
        "seed_everything": 42,
        "trainer": {"strategy": strategy, "max_epochs": epochs, "devices": 2, "precision": "32-true"},
        "model": {"arch": "resnet50", "label_smoothing": 0.1},
        "data": {"batch_size": batch_size, "num_workers": 0},
    }


def original_only(result: dict[str, Any]) -> dict[str, Any]:
    """`result` as a program that knows only the original keys would have written it."""
    return {key: result[key] for key in ORIGINAL_KEYS if key in result} | {
        "epochs": [{key: value for key, value in epoch.items() if key != "comm"} for epoch in result["epochs"]]
    }


def write_result(folder: Path, result: dict[str, Any], *, repeat: int = 1, sweep: bool = False) -> Path:
    """Under the name that a comparison gives it. NaN is written as Python does, bare."""
    processes = result.get("num_workers", result["world_size"]) if sweep else None
    stem = result_stem(
        result.get("strategy", "ddp"), result.get("variant", ""), training_processes=processes, repeat=repeat
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result_filename(stem)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def write_comparison(folder: Path, *, repeats: int = 1, counts: tuple[int, ...] = (2,), **changes: Any) -> Path:
    """The three standard methods; returns `folder`."""
    for strategy in ("ddp", "manual_allreduce", "parameter_server"):
        for count in counts:
            for repeat in range(1, repeats + 1):
                result = make_result(strategy, training_processes=count, repeat=repeat, **changes)
                write_result(folder, result, repeat=repeat, sweep=len(counts) > 1)
    return folder


def _epoch(number: int, losses: list[float], epochs: int, rate: float, comm: dict[str, Any]) -> dict[str, Any]:
    progress = number / epochs
    seconds = len(losses) * comm["step_ms"] / 1000
    record = {
        "epoch": number,
        "train_loss": sum(losses) / len(losses) if losses else math.nan,
        "train_accuracy": 30 + 45 * progress,
        "train_time": seconds,
        "train_throughput": rate,
        "avg_batch_time": comm["step_ms"] / 1000,
        "val_loss": 1.9 - progress,
        "val_accuracy": 25 + 50 * progress,
        "comm": comm,
    }
    if comm["push_ms"] is None:
        return record | {"avg_comm_time": comm["total_ms"] / 1000}
    return record | {"avg_comm_time_pull": comm["pull_ms"] / 1000, "avg_comm_time_push": comm["push_ms"] / 1000}


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "avg_train_throughput": sum(record["train_throughput"] for record in records) / len(records),
        "avg_train_time_per_epoch": sum(record["train_time"] for record in records) / len(records),
        "best_val_accuracy": max(record["val_accuracy"] for record in records),
        "final_train_accuracy": records[-1]["train_accuracy"],
    }
