"""Somebody else's strategy with a ``timeline`` of a few lines is measured, compared and reported on like ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import final

import pytest
from commands import gradsync
from lightning.pytorch.strategies import SingleDeviceStrategy

from gradsync.comm.timeline import StepCommunication

TOTAL_MS, EXPOSED_MS, NUM_BYTES = 9.0, 6.0, 3_000_000


class ToyTimeline:
    """Says of every step what a real one would have measured."""

    def take_step(self) -> StepCommunication | None:
        return StepCommunication(total_ms=TOTAL_MS, exposed_ms=EXPOSED_MS, num_bytes=NUM_BYTES)


@final
class ToyStrategy(SingleDeviceStrategy):
    """Lightning's own for one process, and nothing of ours but the protocol."""

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.timeline = ToyTimeline()


def test_its_figures_are_in_every_report(tmp_path: Path) -> None:
    ended = gradsync(
        *("compare", "--strategies", "ddp,test_toy_strategy.ToyStrategy", "--devices", "1", "--epochs", "1"),
        *("--batch-size", "4", "--workers", "0", "--output", "out", "--", "--model.arch", "resnet18"),
        *("--trainer.limit_train_batches", "8", "--trainer.limit_val_batches", "1"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.output
    found = next((tmp_path / "out").glob("results_*[Tt]oy*.json"))
    measured = json.loads(found.read_text())["comm"]
    assert measured["total_ms"] == pytest.approx(TOTAL_MS)
    assert measured["exposed_ms"] == pytest.approx(EXPOSED_MS)
    assert measured["bytes_per_step"] == NUM_BYTES
    parts = sum(measured[f"{part}_ms"] for part in ("data", "compute", "exposed", "optimizer", "other"))
    assert measured["step_ms"] == pytest.approx(parts)
    for page in ("performance_report.txt", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "Toy" in text, page
        assert re.search(r"9\.0\d*\D+6\.0", text), page  # total, exposed
