"""Fits that record a trace, and what tests ask of one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet

from gradsync.callbacks import CommunicationMonitor, TraceWriter


@dataclass
class Row:
    """The slices of one process."""

    name: str
    slices: list[dict[str, Any]] = field(default_factory=list)

    def named(self, *starts: str) -> list[dict[str, Any]]:
        return [event for event in self.slices if event["name"].startswith(starts)]

    def of(self, category: str) -> list[dict[str, Any]]:
        return [event for event in self.slices if event["cat"] == category]

    def within(self, outer: dict[str, Any]) -> list[dict[str, Any]]:
        return [e for e in self.slices if e is not outer and outer["ts"] <= e["ts"] and end(e) <= end(outer) + 1e-3]


def end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def read_trace(path: Path) -> tuple[dict[str, Row], dict[str, Any]]:
    """Per process by name, and the whole content."""
    content = json.loads(path.read_text())
    rows: dict[int, Row] = {}
    for event in content["traceEvents"]:
        if event["name"] == "process_name":
            rows[event["pid"]] = Row(event["args"]["name"])
        if event["ph"] == "X":
            rows[event["pid"]].slices.append(event)
    return {row.name: row for row in rows.values()}, content


def fit_with_trace(
    rank: int,
    strategy: str,
    processes: int,
    options: dict[str, Any],
    folder: str,
    steps: str = "3-5",
    trainer: dict[str, Any] | None = None,
    module: pl.LightningModule | None = None,
) -> None:
    quiet()
    pl.seed_everything(1, verbose=False)
    callbacks = [CommunicationMonitor(), TraceWriter(steps, folder)]
    runner = make_trainer(
        make_strategy(strategy, options), processes, callbacks=callbacks, **{"max_steps": 8, **(trainer or {})}
    )
    runner.fit(module or Mlp(), DataLoader(make_data(), batch_size=8))
