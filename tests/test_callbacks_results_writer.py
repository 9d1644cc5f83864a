from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_fit import TinyClassifier, TinyData, make_trainer
from typing_extensions import override

from gradsync.callbacks import CommunicationMonitor, ResultsWriter
from gradsync.comm.timeline import StepCommunication

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]

TOP_KEYS = {
    *("schema_version", "method", "strategy", "world_size", "batch_size", "global_batch_size", "data", "demo_data"),
    *("start_time", "end_time", "complete", "warmup_steps", "summary", "epochs", "comm", "environment", "config"),
    "all_losses",
}
EPOCH_KEYS = {
    *("epoch", "train_loss", "train_accuracy", "train_time", "train_throughput", "avg_batch_time"),
    *("val_loss", "val_accuracy", "comm"),
}
SUMMARY_KEYS = {"avg_train_throughput", "avg_train_time_per_epoch", "best_val_accuracy", "final_train_accuracy"}
COMM_KEYS = {
    *("step_ms", "data_ms", "compute_ms", "optimizer_ms", "other_ms", "total_ms", "exposed_ms", "overlapped_ms"),
    *("share_pct", "bytes_per_step", "push_ms", "pull_ms", "wait_ms", "staleness", "total_is_upper_bound"),
}
ENVIRONMENT_KEYS = {
    *("python", "torch", "lightning", "gradsync", "platform", "cpu_model", "cpu_count", "backend", "accelerator"),
    *("omp_num_threads", "strategy_options", "seed", "commit", "load_average"),
}


def read(path: Path | None) -> dict[str, Any]:
    assert path is not None
    # JSON proper: Python's reader would let NaN pass.
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def fit(folder: Path | str, module: TinyClassifier | None = None, **options: Any) -> dict[str, Any]:
    ckpt_path = options.pop("ckpt_path", None)
    more = options.pop("more", [])
    writer = ResultsWriter(folder)
    trainer = make_trainer(folder, [CommunicationMonitor(warmup_steps=3), writer, *more], **options)
    trainer.fit(module or TinyClassifier(), datamodule=TinyData(), ckpt_path=ckpt_path)
    return read(writer.path)


def test_keys_are_exactly_those_promised(tmp_path: Path) -> None:
    result = fit(tmp_path)
    assert set(result) == TOP_KEYS
    assert set(result["summary"]) == SUMMARY_KEYS | {"avg_comm_time"}
    assert set(result["comm"]) == COMM_KEYS
    assert set(result["environment"]) == ENVIRONMENT_KEYS
    assert [entry["epoch"] for entry in result["epochs"]] == [1, 2]
    for entry in result["epochs"]:
        assert set(entry) == EPOCH_KEYS | {"avg_comm_time"}
        assert set(entry["comm"]) == COMM_KEYS | {"measured_steps", "ranks"}


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    module = TinyClassifier()
    result = fit(tmp_path, module)
    assert result["all_losses"] == pytest.approx(module.losses)
    assert (result["world_size"], result["batch_size"], result["global_batch_size"]) == (1, 4, 4)
    assert (result["data"], result["demo_data"]) == (TinyData.description, True)
    assert result["complete"] is True
    first, second = result["epochs"]
    assert [first["comm"]["measured_steps"], second["comm"]["measured_steps"]] == [5, 8]
    for entry, losses in ((first, module.losses[:8]), (second, module.losses[8:])):
        assert entry["train_loss"] == pytest.approx(sum(losses) / 8)
        assert entry["avg_batch_time"] == pytest.approx(entry["comm"]["step_ms"] / 1000)
        assert entry["train_throughput"] == pytest.approx(4 / entry["avg_batch_time"])
        assert entry["avg_comm_time"] == entry["comm"]["total_ms"] == 0.0
        parts = [entry["comm"][f"{name}_ms"] for name in ("data", "compute", "exposed", "optimizer", "other")]
        assert sum(parts) == pytest.approx(entry["comm"]["step_ms"])
    assert second["train_time"] == pytest.approx(8 * second["avg_batch_time"])
    assert result["comm"]["step_ms"] == pytest.approx(
        (5 * first["comm"]["step_ms"] + 8 * second["comm"]["step_ms"]) / 13
    )
    assert result["summary"]["best_val_accuracy"] == max(first["val_accuracy"], second["val_accuracy"])
    assert result["summary"]["final_train_accuracy"] == second["train_accuracy"]


def test_an_accumulated_step_has_one_loss(tmp_path: Path) -> None:
    module = TinyClassifier()
    result = fit(tmp_path, module, accumulate_grad_batches=3, max_epochs=1)
    micro = module.losses
    assert result["all_losses"] == pytest.approx([sum(micro[:3]) / 3, sum(micro[3:6]) / 3, sum(micro[6:]) / 2])
    assert result["global_batch_size"] == 12


def test_an_epoch_without_validation_has_null_there(tmp_path: Path) -> None:
    result = fit(tmp_path, max_epochs=3, check_val_every_n_epoch=2, num_sanity_val_steps=2)
    assert [entry["val_loss"] is None for entry in result["epochs"]] == [True, False, True]
    assert [entry["val_accuracy"] is None for entry in result["epochs"]] == [True, False, True]
    assert result["summary"]["best_val_accuracy"] == result["epochs"][1]["val_accuracy"]


class Diverges(TinyClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    result = fit(tmp_path, Diverges(), max_epochs=1)
    assert result["all_losses"][2] is None
    assert result["epochs"][0]["train_loss"] is None
    assert result["all_losses"][0] is not None


class KillAtEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_leaves_the_epochs_it_finished(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        fit(tmp_path, max_epochs=5, more=[KillAtEpoch(2)])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (path,) = tmp_path.iterdir()
    result = read(path)
    assert [entry["epoch"] for entry in result["epochs"]] == [1, 2]
    assert len(result["all_losses"]) == 16
    assert result["complete"] is False


def test_the_same_callbacks_in_another_fit_start_over(tmp_path: Path) -> None:
    writer, monitor = ResultsWriter(tmp_path, "mine.json"), CommunicationMonitor()
    for _ in range(2):
        module = TinyClassifier()
        trainer = make_trainer(tmp_path, [monitor, writer])
        trainer.fit(module, datamodule=TinyData())
        result = read(tmp_path / "mine.json")
        assert len(result["epochs"]) == 2
        assert result["all_losses"] == pytest.approx(module.losses)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=TinyData())
    result = read(tmp_path / "mine.json")
    assert [entry["epoch"] for entry in result["epochs"]] == [1, 2, 3]
    assert len(result["all_losses"]) == 24


SAVES = {
    "after validation": {"save_on_train_epoch_end": False},
    "at the end of the epoch": {"save_on_train_epoch_end": True},
    "inside the epoch": {"every_n_train_steps": 5},
}


@pytest.mark.parametrize("when", SAVES)
def test_resuming_keeps_what_was_before(tmp_path: Path, when: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoint = ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, **SAVES[when])
    whole = fit(tmp_path, more=[checkpoint], enable_checkpointing=True)
    steps_before = 5 if when == "inside the epoch" else 8
    resumed = fit(tmp_path, ckpt_path=checkpoints / f"step={steps_before}.ckpt")
    assert resumed["start_time"] == whole["start_time"]
    assert [entry["epoch"] for entry in resumed["epochs"]] == [1, 2]
    assert len(resumed["all_losses"]) == 16
    assert resumed["all_losses"][:steps_before] == whole["all_losses"][:steps_before]
    assert all(entry["val_accuracy"] is not None for entry in resumed["epochs"])
    if when != "inside the epoch":
        first, before = resumed["epochs"][0], whole["epochs"][0]
        assert first["train_loss"] == before["train_loss"]
        assert first["val_loss"] == before["val_loss"]
        assert first["train_time"] >= before["train_time"] * 0.999
        assert first["comm"]["measured_steps"] == before["comm"]["measured_steps"]


def test_a_monitor_is_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ResultsWriter needs a CommunicationMonitor .* --trainer\.callbacks"):
        make_trainer(tmp_path, [ResultsWriter(tmp_path)]).fit(TinyClassifier(), datamodule=TinyData())


class ServerTimeline:
    def take_step(self) -> StepCommunication:
        return StepCommunication(9.0, 8.0, 64, push_ms=3.0, pull_ms=4.0, wait_ms=1.0, server_optimizer_ms=0.5)


class ServerStrategy(SingleDeviceStrategy):
    strategy_name = "parameter_server"
    communicates_in_optimizer_step = True
    num_servers = 1

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.timeline = ServerTimeline()
        self.options = {"mode": "sync", "staleness": 0}


def test_a_parameter_server_has_its_own_keys(tmp_path: Path) -> None:
    result = fit(tmp_path, strategy=ServerStrategy())
    assert (tmp_path / "results_ps.json").is_file()
    assert set(result) == TOP_KEYS | {"num_workers"}
    assert (result["method"], result["strategy"]) == ("Parameter Server (PS)", "parameter_server")
    assert (result["world_size"], result["num_workers"]) == (2, 1)
    assert result["environment"]["strategy_options"] == {"mode": "sync", "staleness": 0}
    assert set(result["summary"]) == SUMMARY_KEYS | {"avg_comm_time_pull", "avg_comm_time_push"}
    for entry in result["epochs"]:
        assert set(entry) == EPOCH_KEYS | {"avg_comm_time_pull", "avg_comm_time_push"}
        assert entry["avg_comm_time_pull"] == pytest.approx(0.004)
        assert entry["avg_comm_time_push"] == pytest.approx(0.003)


def distributed_fit(rank: int, folder: str) -> dict[str, Any] | None:
    writer = ResultsWriter(folder)
    trainer = make_trainer(folder, [CommunicationMonitor(1), writer], strategy="ddp", devices=2)
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    return read(writer.path) if rank == 0 else None


def test_ddp_writes_once_with_its_communication(tmp_path: Path) -> None:
    result, _ = run_distributed(distributed_fit, 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results_baseline_ddp.json"]
    assert set(result) == TOP_KEYS
    assert (result["method"], result["strategy"], result["world_size"]) == ("Baseline DDP (PyTorch)", "ddp", 2)
    assert result["global_batch_size"] == 8
    assert result["environment"]["backend"] == "gloo"
    assert len(result["all_losses"]) == 8
    for entry in result["epochs"]:
        assert entry["avg_comm_time"] > 0.0
        assert entry["comm"]["exposed_ms"] > 0.0
        assert entry["comm"]["total_is_upper_bound"] is True
        assert entry["train_throughput"] == pytest.approx(8 / entry["avg_batch_time"])
