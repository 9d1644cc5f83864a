"""Async and bounded mode in real processes: nobody waits for a slow worker longer than the bound says."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch.utils.data import DataLoader
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassAccuracy
from training import NUM_CLASSES, Mlp, make_data, make_strategy, make_trainer, quiet, train

from gradsync.comm.server import AsyncServer
from gradsync.comm.server.shards import spread
from gradsync.errors import UserError
from gradsync.strategies import ParameterServerStrategy

STEP_S = 0.01


class Paced(Mlp):
    """Worker 1 takes ``slowness`` times as long for a step as the others. Has metrics of two kinds."""

    def __init__(self, slowness: int = 1) -> None:
        super().__init__(batch_norm=True)
        self.slowness = slowness
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.labels = CatMetric()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        assert not dist.is_initialized(), "a default group lets Lightning hold collectives in every step"
        self.compute()
        return super().training_step(batch, index)

    def compute(self) -> None:
        time.sleep(STEP_S * (self.slowness if self.global_rank == 1 else 1))

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.labels.update(batch[1][: self.global_rank + 1])  # of another size on every worker

    def on_validation_epoch_end(self) -> None:
        state = torch.cat([value.double().flatten() for value in self.state_dict().values()])
        assert (self.all_gather(state) == state).all(), "workers evaluate different models"
        self.log("val/top1", self.accuracy.compute())
        self.log("val/labels", float(self.labels.compute().numel()))
        self.accuracy.reset()
        self.labels.reset()


def _fit(
    rank: int, processes: int, options: dict[str, Any], slowness: int = 1, trainer: dict[str, Any] | None = None
) -> dict[str, Any]:
    quiet()
    pl.seed_everything(1, verbose=False)
    module = Paced(slowness)
    defaults = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 12, "num_sanity_val_steps": 0}
    runner = make_trainer(make_strategy("parameter_server", options), processes, **{**defaults, **(trainer or {})})
    data = make_data()
    runner.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    kept = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("net.")}
    return {**kept, "metrics": {name: float(value) for name, value in runner.callback_metrics.items()}}


def _run(processes: int, options: dict[str, Any], *more: Any) -> list[dict[str, Any]]:
    return run_distributed(_fit, processes, processes, options, *more)


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    names = [name for name, value in a.items() if isinstance(value, torch.Tensor) and "running" not in name]
    return len(names) > 5 and all(torch.equal(a[name], b[name]) for name in names)


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
def test_async_with_one_worker_is_plain_training_to_the_bit(transport: str) -> None:
    model = {"optimizer": "adamw"}
    options = {"mode": "async", "transport": transport}
    ours = run_distributed(train, 2, "parameter_server", 2, model, {"gradient_clip_val": 0.1}, options)
    plain = run_distributed(train, 1, "ddp", 1, model, {"gradient_clip_val": 0.1})[0]
    assert all(torch.equal(plain[name], state[name]) for state in ours for name in plain)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> memoryview:
    """How many pushes of each worker the server has applied, in memory of all processes."""
    counts = memoryview(mmap.mmap(-1, 3 * 8)).cast("q")
    apply = AsyncServer._apply

    def counted(server: AsyncServer, worker: int, number: int) -> None:
        apply(server, worker, number)
        counts[worker] += 1

    monkeypatch.setattr(AsyncServer, "_apply", counted)
    return counts


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
@pytest.mark.parametrize(("mode", "staleness"), [("async", None), ("bounded", 2)])
def test_a_slow_worker_holds_nobody_back_beyond_the_bound(
    mode: str, staleness: int | None, transport: str, tmp_path: Path, applied: memoryview,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Worker 1 ends a step only when the others have come as far as they may: they would wait for ever for more."""
    most_ahead = 12 if staleness is None else staleness + 1  # who is 2 ahead may begin, and end, one more step

    def compute(module: Paced) -> None:
        while module.global_rank == 1 and min(applied[0], applied[2]) < min(12, applied[1] + most_ahead):
            time.sleep(0.001)
        time.sleep(STEP_S)  # in which they could go too far

    monkeypatch.setattr(Paced, "compute", compute)  # the ranks are forked: they inherit it
    options = {"mode": mode, "staleness": staleness, "record_schedule": tmp_path / "schedule.json"}
    options["transport"] = transport
    states = _run(4, options, 1, {"max_epochs": 1})
    schedule = json.loads((tmp_path / "schedule.json").read_text())
    assert sorted(schedule) == sorted([0, 1, 2] * 12)
    ahead = [schedule[: end + 1].count(worker) - schedule[: end + 1].count(1) for end, worker in enumerate(schedule)]
    assert max(ahead) == most_ahead
    assert all(_equal(state, states[0]) for state in states)  # all end with the server's parameters


def test_metrics_are_gathered_over_all_workers_without_a_group() -> None:
    _, *workers = _run(4, {"mode": "async"}, 3)
    for state in workers:
        state["metrics"].pop("loss")  # a worker's own
        assert state["metrics"] == workers[0]["metrics"]
        assert 0.2 < state["metrics"]["val/top1"] <= 1
        assert state["metrics"]["val/labels"] == 20 * (1 + 2 + 3)  # 60 batches over 3 workers


class Evaluated(Mlp):
    """Metrics of two kinds, and predictions."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.labels = CatMetric()

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.labels.update(batch[1])
        self.log("top1", self.accuracy)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.log("labels", float(self.labels.compute().sum()))
        self.labels.reset()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]).argmax(1)


def _evaluate(rank: int, strategy: str, processes: int, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    quiet()
    pl.seed_everything(1, verbose=False)
    module, loader = Evaluated(), DataLoader(make_data(), batch_size=8)
    runner = make_trainer(make_strategy(strategy, options), processes)
    return (
        runner.validate(module, loader, verbose=False),
        runner.test(module, loader, verbose=False),
        runner.predict(module, loader),
    )


@pytest.mark.parametrize("options", [{"mode": "sync"}, {"mode": "async"}, {"mode": "sync", "servers": 2}])
def test_evaluation_and_prediction_are_those_of_ddp(options: dict[str, Any]) -> None:
    servers = options.get("servers", 1)
    processes = 2 + servers
    ours = run_distributed(_evaluate, processes, "parameter_server", processes, options)
    reference = run_distributed(_evaluate, 2, "ddp", 2, {})
    for (validated, tested, predicted), (*metrics, expected) in zip(ours[servers:], reference, strict=True):
        assert [validated, tested] == metrics
        assert all(torch.equal(a, b) for a, b in zip(predicted, expected, strict=True))
    assert ours[0][:2] == reference[0][:2]  # the process that was started knows the metrics


def test_a_recorded_run_is_repeated_to_the_bit(tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.json"
    first = _run(3, {"mode": "async", "record_schedule": schedule}, 3)
    again = _run(3, {"mode": "async", "replay_schedule": schedule}, 1)
    assert _equal(first[0], again[0])


def test_staleness_zero_is_sync_mode() -> None:
    bounded, sync = (
        run_distributed(train, 3, "parameter_server", 3, {}, {}, options)[0]
        for options in ({"mode": "bounded", "staleness": 0}, {})
    )
    assert all(torch.equal(sync[name], bounded[name]) for name in sync)


def test_a_sync_checkpoint_goes_on_in_async_mode_and_back(tmp_path: Path) -> None:
    def fit(mode: str, folder: str, max_epochs: int, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        root = str(tmp_path / folder)
        trainer = {"max_steps": -1, "max_epochs": max_epochs, "enable_checkpointing": True, "default_root_dir": root}
        model, options = {"optimizer": "adamw"}, {"mode": mode}
        # one worker: then the order of steps cannot differ
        return run_distributed(train, 2, "parameter_server", 2, model, trainer, options, ckpt_path)[1]

    whole = fit("sync", "whole", 3)
    fit("sync", "parts", 1)
    fit("async", "parts", 2, _newest_checkpoint(tmp_path / "parts"))
    resumed = fit("sync", "parts", 3, _newest_checkpoint(tmp_path / "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _newest_checkpoint(folder: Path) -> str:
    return str(max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


# -- several servers ---------------------------------------------------------------------------------------------


def _train_on(servers: int, model: Any, trainer: dict[str, Any], **options: Any) -> list[dict[str, torch.Tensor]]:
    processes = servers + 2
    return run_distributed(
        train, processes, "parameter_server", processes, model, trainer, {"servers": servers, **options}
    )


@pytest.mark.parametrize("model", [{}, {"optimizer": "adamw", "unused": True, "batch_norm": True}, "two_optimizers"])
@pytest.mark.parametrize("options", [{}, {"transport": "ipc"}, {"share_parameters": True}], ids=str)
def test_any_number_of_servers_gives_the_same_bits(model: Any, options: dict[str, Any]) -> None:
    alone = _train_on(1, model, {}, **options)[1:]
    for servers in (2, 3, 5):
        first, *states = _train_on(servers, model, {}, **options)
        for state, reference in zip(states[-2:], alone, strict=True):
            assert all(torch.equal(reference[name], state[name]) for name in reference)
        assert all(torch.equal(states[-2][name], first[name]) for name in first)  # the process that was started


def test_the_norm_is_that_of_the_whole_gradient() -> None:
    one, three = (_train_on(servers, {}, {"gradient_clip_val": 0.1})[-1] for servers in (1, 3))
    for name, value in one.items():
        # the squares are added up in another order: a few ulp of values below 1, over 20 steps
        torch.testing.assert_close(three[name], value, rtol=0, atol=1e-6)


def test_a_checkpoint_resumes_under_another_number_of_servers(tmp_path: Path) -> None:
    def fit(servers: int, max_epochs: int, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        trainer = {"max_steps": -1, "max_epochs": max_epochs, "enable_checkpointing": True}
        trainer["default_root_dir"] = str(tmp_path / str(max_epochs))
        model, options, processes = {"optimizer": "adamw"}, {"servers": servers}, servers + 1
        return run_distributed(train, processes, "parameter_server", processes, model, trainer, options, ckpt_path)[-1]

    whole = fit(1, 3)
    fit(3, 1)
    fit(2, 2, _newest_checkpoint(tmp_path / "1"))
    resumed = fit(5, 3, _newest_checkpoint(tmp_path / "2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_parameters_are_spread_evenly_and_cut_only_where_that_is_exact() -> None:
    sizes = [(1000, 100), (10,), (50, 50), (7,), (300, 100)]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for num_servers in (1, 2, 3, 5):
        total = sum(p.nbytes for p in parameters)
        served = spread(parameters, num_servers, may_cut=True)
        loads = [sum(4 * (cut.end - cut.start) for cut in own) for own in served]
        assert sum(loads) == total
        assert max(loads) <= 1.5 * total / num_servers
        assert all(cut.start % 64 == 0 for own in served for cut in own)
        whole = spread(parameters, num_servers, may_cut=False)
        assert sorted(cut.index for own in whole for cut in own) == list(range(len(sizes)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"servers": 0}, "servers must be >= 1, got 0"),
        ({"servers": 2, "transport": "naive"}, "transport naive knows one server only"),
        ({"mode": "hogwild"}, "mode must be one of sync, async, bounded, got 'hogwild'"),
        ({"staleness": 3}, "staleness is the bound of --trainer.strategy.mode bounded, but the mode is sync"),
        ({"mode": "bounded", "staleness": -1}, "staleness must be >= 0 steps"),
        ({"staleness_correction": True}, "staleness_correction needs --trainer.strategy.mode async or bounded"),
        ({"share_parameters": True, "transport": "ipc"}, "share_parameters needs --trainer.strategy.transport shared"),
        ({"share_parameters": True, "mode": "async"}, "share_parameters needs --trainer.strategy.mode sync"),
        ({"on_worker_loss": "ignore"}, "on_worker_loss must be one of stop, continue, got 'ignore'"),
        ({"on_worker_loss": "continue", "transport": "naive"}, "with naive every worker takes part in every step"),
        ({"max_replacements": 1}, "max_replacements needs --trainer.strategy.on_worker_loss continue"),
        (
            {"on_worker_loss": "continue", "max_replacements": 1, "mode": "async"},
            "max_replacements needs --trainer.strategy.mode sync so far, got async",
        ),
        ({"on_worker_loss": "continue", "share_parameters": True}, "leave out --trainer.strategy.share_parameters"),
        ({"share_parameters": True, "wire_dtype": "bfloat16"}, "leave out --trainer.strategy.wire_dtype bfloat16"),
        ({"mode": "async", "transport": "naive"}, "transport naive knows the mode sync only"),
        ({"servers": 2, "transport": "collective"}, "transport collective knows one server only"),
        ({"mode": "bounded", "transport": "collective"}, "transport collective knows the mode sync only"),
        ({"wire_dtype": "float8"}, "wire_dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"wire_dtype": "bfloat16", "transport": "naive"}, "wire_dtype needs .*: naive sends tensors as they are"),
        ({"wire_dtype": "bfloat16", "transport": "collective"}, "wire_dtype needs .*: collective sends tensors as"),
    ],
)
def test_options_that_contradict_each_other_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ParameterServerStrategy(**options)
