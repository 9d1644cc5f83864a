"""The parts of a result file as plain dictionaries. Times in seconds, except in ``comm`` (milliseconds)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from .run_environment import num_servers
from .step_breakdown import StepBreakdown

SCHEMA_VERSION = 1


def describe_run(trainer: pl.Trainer) -> dict[str, Any]:
    """Processes, batch sizes and data: known when a fit starts. ``num_workers`` only where servers exist."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    batch_size = getattr(datamodule, "batch_size", None) or _loader_batch_size(trainer)
    servers = num_servers(trainer.strategy)
    return {
        "world_size": trainer.world_size + servers,
        "batch_size": batch_size,
        **({"num_workers": trainer.world_size} if servers else {}),
        "global_batch_size": batch_size and batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "data": getattr(datamodule, "description", None) or type(datamodule or trainer.train_dataloader).__name__,
        "demo_data": bool(getattr(datamodule, "is_demo", False)),
    }


def _loader_batch_size(trainer: pl.Trainer) -> int | None:
    return getattr(trainer.train_dataloader, "batch_size", None)


def communication(mean: StepBreakdown) -> dict[str, Any]:
    """``comm``: where an average step of rank zero went, in milliseconds."""
    figures = dataclasses.asdict(mean)
    del figures["num_steps"], figures["num_images"]
    figures["bytes_per_step"] = figures.pop("num_bytes")
    return {**figures, "share_pct": mean.share_pct}


def average_communication(mean: StepBreakdown, *, has_server: bool) -> dict[str, float | None]:
    """Seconds per step under the keys of the original experiment: pull and push, or one figure without server."""
    if has_server:
        parts = {"avg_comm_time_pull": mean.pull_ms, "avg_comm_time_push": mean.push_ms}
        return {key: None if part_ms is None else part_ms / 1000.0 for key, part_ms in parts.items()}
    return {"avg_comm_time": mean.total_ms / 1000.0}


def summarize(epochs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """``summary`` without communication; null for what no epoch has."""
    accuracies = _present(epochs, "val_accuracy")
    return {
        "avg_train_throughput": _mean(_present(epochs, "train_throughput")),
        "avg_train_time_per_epoch": _mean(_present(epochs, "train_time")),
        "best_val_accuracy": max(accuracies, default=None),
        "final_train_accuracy": epochs[-1]["train_accuracy"] if epochs else None,
    }


def figure(metrics: Mapping[str, Any], name: str) -> float | None:
    """A logged metric as a number, or None; may wait for its device."""
    value = metrics.get(name)
    return None if value is None else float(value)


def _present(epochs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in epochs if entry.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
