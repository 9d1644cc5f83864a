"""Every run carries the same dashboard, with tags that the run really writes, and ends with what it came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, num_processes, quiet

from gradsync.callbacks import CommunicationMonitor, Dashboard, RunSummary


def _fit(rank: int, folder: Path, strategy: str, devices: int, options: dict[str, Any]) -> None:
    quiet()
    logger = TensorBoardLogger(folder, name=None, version="run", default_hp_metric=False)
    callbacks = [CommunicationMonitor(warmup_steps=1), Dashboard(), RunSummary()]
    made: Any = "auto" if devices == 1 else make_strategy(strategy, options)
    trainer = make_trainer(made, devices, max_steps=8, logger=logger, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(Mlp(), DataLoader(make_data(), batch_size=8))


def _events(folder: Path, strategy: str, num_trainers: int, **options: Any) -> EventAccumulator:
    processes = num_processes(strategy, num_trainers)
    run_distributed(_fit, processes, folder, strategy, processes, options)
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    return events


def _charts(events: EventAccumulator) -> dict[str, list[str]]:
    """Tags of the layout's charts, by category."""
    packed = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    tags: dict[str, list[str]] = {}
    for category in layout_pb2.Layout.FromString(packed).category:
        for chart in category.chart:
            margins = [tag for s in chart.margin.series for tag in (s.value, s.lower, s.upper)]
            tags.setdefault(category.title, []).extend([*chart.multiline.tag, *margins])
    return tags


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "parameter_server", "sharded_server"])
def test_every_chart_of_the_layout_has_data(strategy: str, tmp_path: Path) -> None:
    events = _events(tmp_path, strategy, 2)
    charts = _charts(events)
    assert list(charts) == ["Training", "Communication", "Step", "System", "Ranks"]
    charts["Training"] = [tag for tag in charts["Training"] if tag.startswith("^perf")]  # the MLP logs no metrics
    written = set(events.Tags()["scalars"])
    assert {tag.strip("^$") for tags in charts.values() for tag in tags} <= written
    for tag in charts["Ranks"][::3]:
        values, lows, highs = ([e.value for e in events.Scalars(f"{tag}{end}")] for end in ("", "_min", "_max"))
        assert all(low <= value <= high for low, value, high in zip(lows, values, highs, strict=True))


def test_workers_at_different_paces_exchange_nothing_in_an_epoch(tmp_path: Path) -> None:
    events = _events(tmp_path, "parameter_server", 2, mode="async")
    assert "comm/exposed_ms" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["scalars"] if tag.endswith(("_min", "_max"))]


def test_a_run_ends_with_an_hparams_entry_a_text_and_a_picture(tmp_path: Path) -> None:
    events = _events(tmp_path, "manual_allreduce", 2, bucket_mib=3)
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    choices = {
        name: value.string_value or value.number_value for name, value in start.session_start_info.hparams.items()
    }
    assert choices == {
        "strategy": "manual_allreduce",
        "world_size": 2.0,
        "batch_size": 8.0,
        "learning_rate": 0.1,
        "precision": "32-true",
    }
    assert events.Scalars("summary/images_per_s")[0].value > 0
    text = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| bucket_mib | 3 |" in text
    assert "| exposed communication |" in text
    assert events.Tags()["images"] == ["step breakdown"]
