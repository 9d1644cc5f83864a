"""Every run carries the same dashboard, with tags that the run really writes."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_trainer, quiet

from gradsync.callbacks import CommunicationMonitor, Dashboard


def test_the_layout_is_in_the_run_and_its_step_charts_have_data(tmp_path: Path) -> None:
    quiet()
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    callbacks: list[pl.Callback] = [CommunicationMonitor(warmup_steps=1), Dashboard()]
    trainer = make_trainer("auto", 1, max_steps=8, logger=logger, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(Mlp(), DataLoader(make_data(), batch_size=8))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    packed = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(packed)
    charts = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert list(charts) == ["Training", "Communication", "Step"]
    written = set(events.Tags()["scalars"])
    assert {*charts["Communication"], *charts["Step"], "perf/images_per_s"} <= written
