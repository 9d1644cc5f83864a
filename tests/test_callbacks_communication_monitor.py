from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_fit import TinyClassifier, TinyData, loader, make_trainer
from typing_extensions import override

from gradsync.callbacks import CommunicationMonitor, StepBreakdown
from gradsync.comm.timeline import StepCommunication

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True"),
]

TAGS = {
    *("comm/exposed_ms", "comm/total_ms", "comm/overlapped_ms", "comm/share_pct", "comm/bytes"),
    *("time/data_ms", "time/compute_ms", "time/optimizer_ms", "time/other_ms", "perf/step_ms", "perf/images_per_s"),
    *("system/cpu_pct", "system/rss_mib", "system/page_faults_per_s"),
}


class Record(Callback):
    """Keeps every step of the monitor, and the wall time of the whole training."""

    def __init__(self, monitor: CommunicationMonitor) -> None:
        self.monitor = monitor
        self.steps: list[StepBreakdown] = []
        self.epochs: list[StepBreakdown | None] = []

    @override
    def on_train_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        step = self.monitor.last_step
        if step is not None and (not self.steps or step is not self.steps[-1]):
            self.steps.append(step)

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append(self.monitor.epoch_summary())

    @override
    def on_train_end(self, *_: Any) -> None:
        self.wall_ms = 1000 * (time.perf_counter() - self._start)


def fit(
    folder: Path | str, module: pl.LightningModule | None = None, data: Any = None, warmup: int = 0, **options: Any
) -> Record:
    record = Record(CommunicationMonitor(warmup_steps=warmup))
    trainer = make_trainer(folder, [record.monitor, record], **options)
    trainer.fit(module or TinyClassifier(), datamodule=data or TinyData())
    return record


def assert_law(step: StepBreakdown) -> None:
    parts = [step.data_ms, step.compute_ms, step.exposed_ms, step.optimizer_ms, step.other_ms]
    assert sum(parts) == pytest.approx(step.step_ms)
    assert min(parts) >= 0.0


def test_a_single_device_has_times_and_no_communication(tmp_path: Path) -> None:
    record = fit(tmp_path)
    assert len(record.steps) == 2 * 8
    for step in record.steps:
        assert_law(step)
        assert min(step.data_ms, step.compute_ms, step.optimizer_ms, step.other_ms) > 0.0
        assert (step.exposed_ms, step.total_ms, step.num_bytes) == (0.0, 0.0, 0)
        assert step.num_images == 4
    assert sum(step.step_ms for step in record.steps) <= record.wall_ms


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # pyright: ignore
        loss = closure()
        time.sleep(0.02)
        super().step()
        return loss


class SlowModule(TinyClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.04)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SlowSGD(self.parameters(), lr=0.1)


class SlowData(TinyData):
    def train_dataloader(self) -> torch.utils.data.DataLoader:
        def collate(samples: list[Any]) -> Any:
            time.sleep(0.03)
            return torch.utils.data.default_collate(samples)

        return torch.utils.data.DataLoader(loader(16).dataset, batch_size=4, collate_fn=collate)


def test_each_phase_holds_what_happens_in_it(tmp_path: Path) -> None:
    record = fit(tmp_path, SlowModule(), SlowData(), num_sanity_val_steps=0)
    for step in record.steps:
        assert_law(step)
        assert step.data_ms >= 30.0
        assert step.compute_ms >= 40.0
        assert step.optimizer_ms >= 20.0
    validation_ms = 2 * 2 * 50.0
    assert sum(step.step_ms for step in record.steps) <= record.wall_ms - validation_ms


def test_validation_inside_an_epoch_is_no_part_of_a_step(tmp_path: Path) -> None:
    record = fit(tmp_path, SlowModule(), val_check_interval=2, max_epochs=1, num_sanity_val_steps=0)
    assert len(record.steps) == 8
    assert sum(step.step_ms for step in record.steps) <= record.wall_ms - 4 * 2 * 50.0


@pytest.mark.parametrize(("accumulate", "images"), [(3, [12, 12, 8]), (4, [16, 16])])
def test_a_step_is_all_its_micro_batches(tmp_path: Path, accumulate: int, images: list[int]) -> None:
    record = fit(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate)
    assert [step.num_images for step in record.steps] == images
    for step in record.steps:
        assert_law(step)


class TwoNetworks(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()  # pyright: ignore
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        time.sleep(0.02)
        second.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def test_manual_optimization_with_two_optimizers_computes_between_them(tmp_path: Path) -> None:
    record = fit(tmp_path, TwoNetworks(), max_epochs=1)
    assert len(record.steps) == 8
    for step in record.steps:
        assert_law(step)
        assert step.compute_ms >= 20.0


def test_means_leave_the_warmup_out(tmp_path: Path) -> None:
    record = fit(tmp_path, warmup=10)
    monitor = record.monitor
    first, second = record.epochs
    assert first is not None
    assert first.num_steps == 8  # shorter than the warm-up: nothing else to show
    assert second is not None
    assert second.num_steps == monitor.epoch_measured_steps == 6
    assert second.step_ms == pytest.approx(sum(s.step_ms for s in record.steps[10:]) / 6)
    assert monitor.run_summary() == second
    assert monitor.epoch_wall_s == pytest.approx(sum(s.step_ms for s in record.steps[8:]) / 1000)


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
        CommunicationMonitor(warmup_steps=-1)


def test_several_fits_with_the_same_callbacks_start_over(tmp_path: Path) -> None:
    monitor = CommunicationMonitor(warmup_steps=2)
    for _ in range(2):
        make_trainer(tmp_path, [monitor]).fit(TinyClassifier(), datamodule=TinyData())
        summary = monitor.run_summary()
        assert summary is not None
        assert summary.num_steps == 14
    trainer = make_trainer(tmp_path, [monitor])
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    trainer.validate(TinyClassifier(), datamodule=TinyData(), verbose=False)
    assert monitor.run_summary() is not None


class Fails(TinyClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise RuntimeError("as planned")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_hooked_after_a_fit(tmp_path: Path, fails: bool) -> None:
    trainer = make_trainer(tmp_path, [CommunicationMonitor()])
    with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
        trainer.fit(Fails() if fails else TinyClassifier(), datamodule=TinyData())
    assert "_on_before_fetch" not in vars(trainer.fit_loop.epoch_loop)
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


class MemoryLogger(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.points.append((step, dict(metrics)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_points_lie_where_lightning_puts_its_own(tmp_path: Path, accumulate: int) -> None:
    logger = MemoryLogger()
    fit(tmp_path, logger=logger, max_epochs=2, accumulate_grad_batches=accumulate)
    ours = {step: set(point) for step, point in logger.points if "perf/step_ms" in point}
    theirs = [step for step, point in logger.points if "train/loss_step" in point]
    assert set(ours) == set(theirs) == set(range(1, 16 // accumulate, 2))
    assert all(tags == TAGS for tags in ours.values())


class ServerTimeline:
    def take_step(self) -> StepCommunication:
        return StepCommunication(
            total_ms=9.0, exposed_ms=8.0, num_bytes=64, push_ms=3.0, pull_ms=4.0, wait_ms=1.0, server_optimizer_ms=2.0
        )


class ServerStrategy(SingleDeviceStrategy):
    strategy_name = "parameter_server"
    communicates_in_optimizer_step = True
    num_servers = 1

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.timeline = ServerTimeline()


def test_a_strategy_that_communicates_in_its_optimizer_step(tmp_path: Path) -> None:
    record = fit(tmp_path, SlowModule(), strategy=ServerStrategy(), logger=(logger := MemoryLogger()))
    for step in record.steps:
        assert_law(step)
        assert (step.exposed_ms, step.optimizer_ms, step.overlapped_ms) == (8.0, 2.0, 1.0)
        assert step.compute_ms >= 40.0
        assert step.other_ms >= 20.0 - 8.0 - 2.0
    tags = next(set(point) for _, point in logger.points if "perf/step_ms" in point)
    assert tags == TAGS | {"comm/push_ms", "comm/pull_ms", "comm/wait_ms"}


def distributed_fit(rank: int, folder: str, strategy: str, accumulate: int) -> dict[str, Any]:
    logger = MemoryLogger()
    record = fit(folder, strategy=strategy, devices=2, logger=logger, max_epochs=2, accumulate_grad_batches=accumulate)
    return {"steps": record.steps, "wall_ms": record.wall_ms, "points": logger.points}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce"])
def test_two_ranks_communicate(tmp_path: Path, strategy: str, accumulate: int) -> None:
    results = run_distributed(distributed_fit, 2, str(tmp_path), strategy, accumulate)
    num_bytes = 4 * sum(p.numel() for p in TinyClassifier().parameters())
    for result in results:
        assert len(result["steps"]) == 2 * 4 // accumulate
        assert sum(step.step_ms for step in result["steps"]) <= result["wall_ms"]
        for step in result["steps"]:
            assert_law(step)
            assert step.exposed_ms > 0.0
            assert step.total_ms > 0.0
            assert step.num_bytes == 2 * num_bytes
            assert step.num_images == 2 * 4 * accumulate
            assert step.total_is_upper_bound == (strategy == "ddp")
    assert any("comm/exposed_ms" in point for _, point in results[0]["points"])
    assert not any("comm/exposed_ms" in point for _, point in results[1]["points"])
