"""What the parameter server shows of itself: its TensorBoard run holds laws, and nothing is written where none is."""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, newest_checkpoint, quiet

from gradsync.comm.server import ServerStatistics, statistics
from gradsync.comparison_runs import _SHOWN
from gradsync.strategies import server_view

STEPS, EVERY = 12, 5
COMMON = ["pushes_per_s", "queue_pushes", "in_bytes", "out_bytes", "step_ms", "receive_ms", "optimizer_ms", "send_ms"]
SYNC = {f"server/{name}" for name in [*COMMON, "reduce_ms"]}
ASYNC = {f"server/{name}" for name in [*COMMON, "staleness_mean", "staleness_max", "lag_pushes"]}
NUM_BYTES = 4 * sum(p.numel() for p in Mlp().parameters())


class Pausing(Mlp):
    """Worker 1 may pause once."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == STEPS - 2 and self.global_rank == 1:
            self.pause()
        return super().training_step(batch, index)

    def pause(self) -> None:
        pass


def _fit(
    rank: int, folder: Path | None, processes: int, options: dict[str, Any], ckpt_path: str | None = None,
    max_steps: int = STEPS,
) -> str:  # fmt: skip
    """What this process printed."""
    quiet()
    pl.seed_everything(1, verbose=False)
    logger = TensorBoardLogger(folder, name=None) if folder is not None else False
    strategy = make_strategy("parameter_server", {"server_log_every_n_steps": EVERY, **options})
    files: dict[str, Any] = {"default_root_dir": folder, "enable_checkpointing": folder is not None}
    trainer = make_trainer(strategy, processes, max_steps=max_steps, logger=logger, **(files if folder else {}))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.fit(Pausing(), DataLoader(make_data(), batch_size=8), ckpt_path=ckpt_path)
        trainer.validate(Pausing(), DataLoader(make_data(), batch_size=8), verbose=False)
    return printed.getvalue()


def _run(folder: Path | None, processes: int, options: dict[str, Any], **more: Any) -> list[list[str]]:
    """Lines that each process printed of servers."""
    values = (more.get("ckpt_path"), more.get("max_steps", STEPS))
    printed = run_distributed(_fit, processes, folder, processes, options, *values)
    return [[line for line in text.splitlines() if line.startswith("server")] for text in printed]


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def _values(events: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


def _rows(events: EventAccumulator) -> list[list[str]]:
    """Of the last table of workers."""
    text = events.Tensors("server/workers/text_summary")[-1].tensor_proto.string_val[0].decode()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


@pytest.mark.parametrize("transport", ["shared_memory", "ipc", "naive"])
def test_a_sync_server_counts_every_worker_in_every_step(transport: str, tmp_path: Path) -> None:
    _run(tmp_path, 3, {"transport": transport})
    events = _events(tmp_path / "version_0" / "server")
    assert set(events.Tags()["scalars"]) == SYNC
    assert events.Tags()["histograms"] == []
    assert [event.step for event in events.Scalars("server/in_bytes")] == [5, 10, 12]  # the rest at the end
    assert _values(events, "server/in_bytes") == _values(events, "server/out_bytes") == [2 * NUM_BYTES] * 3
    for pushes, step_ms in zip(_values(events, "server/pushes_per_s"), _values(events, "server/step_ms"), strict=True):
        assert pushes * step_ms / 1e3 == pytest.approx(2)
    assert all(0 < queue <= 2 for queue in _values(events, "server/queue_pushes"))
    header, _, *rows = _rows(events)
    assert header == ["worker", "pushes", "behind", "last seen", "wait per push"]
    assert [row[:3] for row in rows] == [["0", "12", "0"], ["1", "12", "0"]]


@pytest.mark.parametrize("options", [{"mode": "async"}, {"mode": "bounded", "staleness": 1}])
def test_staleness_of_every_push_is_in_one_histogram(options: dict[str, Any], tmp_path: Path) -> None:
    _run(tmp_path, 4, options)
    events = _events(tmp_path / "version_0" / "server")
    assert set(events.Tags()["scalars"]) == ASYNC
    histograms = [event.histogram_value for event in events.Histograms("server/staleness")]
    assert sum(h.num for h in histograms) == sum(sum(h.bucket) for h in histograms) == 3 * STEPS
    assert [len(h.bucket) - 1 for h in histograms] == _values(events, "server/staleness_max")
    means = [h.sum / h.num for h in histograms]
    assert means == pytest.approx(_values(events, "server/staleness_mean"), abs=1e-6)
    if "staleness" in options:
        assert max(_values(events, "server/staleness_max")) <= 2 * 3  # of 2 others at most 2 s + 1 updates each
    header, _, *rows = _rows(events)
    assert header[-1] == "staleness"
    assert [row[:3] for row in rows] == [[str(worker), "12", "0"] for worker in range(3)]
    mean = sum(h.sum for h in histograms) / (3 * STEPS)
    assert sum(float(row[-1]) for row in rows) / 3 == pytest.approx(mean, abs=0.05 + 1e-9)  # one decimal is shown


def test_every_server_has_a_run_and_they_share_the_bytes(tmp_path: Path) -> None:
    first, second, *workers = _run(tmp_path, 4, {"servers": 2})
    runs = [_events(tmp_path / "version_0" / name) for name in ("server_0", "server_1")]
    for received in zip(*(_values(events, "server/in_bytes") for events in runs), strict=True):
        assert sum(received) == 2 * NUM_BYTES
    assert first[0].startswith("server 0: step 5 | ")
    assert second[0].startswith("server 1: step 5 | ")
    assert all(_SHOWN.match(line) for line in first + second)
    assert workers == [[], []]
    layouts = [e.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0] for e in runs]
    assert layouts[0] == layouts[1]  # or TensorBoard would show charts twice
    charts = [c.title for category in layout_pb2.Layout.FromString(layouts[0]).category for c in category.chart]
    assert len(charts) == 6
    assert set(charts) <= set(runs[0].Tags()["scalars"])


def test_a_resumed_run_goes_on_at_its_step(tmp_path: Path) -> None:
    _run(tmp_path, 3, {}, max_steps=10)
    path = newest_checkpoint(tmp_path / "version_0" / "checkpoints")
    _run(tmp_path, 3, {}, ckpt_path=path, max_steps=20)
    events = _events(tmp_path / "version_1" / "server")
    assert [event.step for event in events.Scalars("server/in_bytes")] == [15, 20]


def test_without_a_logger_there_are_lines_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server, *workers = _run(None, 3, {})
    assert [line.split(" | ")[0] for line in server[:2]] == ["server: step 5", "server: step 10"]
    assert " MB/s in, " in server[0]
    assert "staleness" not in server[0]
    assert [line.split(" | ")[0] for line in server[2:]] == ["server: worker 0", "server: worker 1"]
    assert workers == [[], []]
    assert list(tmp_path.iterdir()) == []


def test_every_zero_steps_is_never_anywhere(tmp_path: Path) -> None:
    assert _run(tmp_path, 3, {"server_log_every_n_steps": 0}) == [[], [], []]
    assert not (tmp_path / "version_0" / "server").exists()


@pytest.mark.parametrize(("options", "step"), [({}, 10), ({"mode": "bounded", "staleness": 1}, 34)])
def test_a_worker_that_keeps_the_others_waiting_is_named(
    options: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = rf"step {step} \| the others wait for worker 1, last seen \d+ s ago"  # bounded: 12 + 10 + 12 pushes
    was_named, say = mmap.mmap(-1, 1), server_view.ServerView._say

    def heard(view: server_view.ServerView, said: str) -> None:
        say(view, said)
        if re.fullmatch(text, said):
            was_named[:1] = b"."

    def pause(module: Pausing) -> None:
        while was_named[:1] != b".":
            time.sleep(0.01)

    monkeypatch.setattr(statistics, "_LAGGING_S", 0.5)  # the ranks are forked: they inherit it
    monkeypatch.setattr(server_view, "_FIRST_ALARM_S", 0.5)
    monkeypatch.setattr(server_view.ServerView, "_say", heard)
    monkeypatch.setattr(Pausing, "pause", pause)
    server, *_ = _run(None, 4, options)  # ends only if worker 1 is named
    waiting = [line for line in server if line.startswith(f"server: step {step} | the others wait for")]
    assert waiting
    assert all("worker 1, last seen" in line for line in waiting)


def test_who_lags_is_a_matter_of_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(now_s * 1e9) + 1)
    counted = ServerStatistics(3)
    for second in range(1, 101):
        now_s = second
        for worker in range(3):
            if worker < 2 or second % 10 == 0:  # the last one is always ten times as slow
                counted.seen_ns[worker] = time.perf_counter_ns()
                counted.applied(worker)
                counted.answered(worker, time.perf_counter_ns())
        counted.count_step({"receive_ms": 1, "reduce_ms": 2, "optimizer_ms": 3})
    now_s = 109
    assert [figures.worker for figures in counted.lagging()] == [0, 1]
    counted.left.add(0)
    assert [figures.worker for figures in counted.lagging()] == [1]
    assert [figures.behind for figures in counted.workers()] == [0, 0, 90]
    assert [figures.last_seen_s for figures in counted.workers()] == [9, 9, 9]
    interval = counted.take()
    assert (interval.num_steps, interval.num_pushes, interval.elapsed_s) == (100, 210, 108)
    assert (interval.receive_ms, interval.reduce_ms, interval.optimizer_ms) == (1, 2, 3)
    assert counted.take().num_pushes == 0
