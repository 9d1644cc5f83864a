"""``gradsync inspect --buckets``: the plan is what a real run does, to the byte."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from inspecting import records, refusal, shown
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_strategy, make_trainer, num_processes, quiet

from gradsync import UserError
from gradsync.callbacks import CommunicationMonitor
from gradsync.comm.algorithms import HalvingDoublingAllReduce, RingAllReduce
from gradsync.comm.algorithms.exchange import bytes_of
from gradsync.comm.buckets import room_for
from gradsync.inspection import StrategyPlan, plan_strategy
from gradsync.inspection.bucket_plan import numbers_by_name
from gradsync.strategy_variant import Variant


class Layered(pl.LightningModule):
    """Several buckets of 1 MiB, of two dtypes, computed in the order in which they are built; a part is not trained."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 700, 300, 900, 7]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.gain = nn.ParameterList([torch.ones(33, dtype=torch.float64)])
        self.frozen = nn.Linear(50, 50).requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        hidden = batch[0]
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return hidden.square().mean() + self.gain[0].sum() * 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Buckets(pl.Callback):
    """Names and bytes of the buckets that a strategy has in its last step."""

    found: list[tuple[set[str], int]] | None = None

    def on_train_end(self, trainer: Any, module: Any) -> None:
        strategy = trainer.strategy
        reducer = getattr(strategy, "_reducer", None) or getattr(getattr(strategy, "_server", None), "_reducer", None)
        if reducer is not None:
            names = {p: name for name, p in module.named_parameters()}
            self.found = [({names[p] for p in bucket.parameters()}, bucket.num_bytes) for bucket in reducer.buckets]


def _fit(rank: int, strategy: str, processes: int, options: dict[str, Any]) -> tuple[int, Any]:
    quiet()
    monitor, buckets = CommunicationMonitor(warmup_steps=0), Buckets()
    trainer = make_trainer(make_strategy(strategy, options), processes, max_steps=3, callbacks=[monitor, buckets])
    trainer.fit(Layered(), DataLoader(TensorDataset(torch.randn(48, 16)), batch_size=2))
    step = monitor.last_step
    return (-1 if step is None else int(step.num_bytes)), buckets.found


def _plan(strategy: str, options: dict[str, Any], world_size: int) -> StrategyPlan:
    given = tuple((name, str(value).lower()) for name, value in options.items())
    with torch.device("meta"):
        module = Layered()
    return plan_strategy(module, Variant(strategy, given), [world_size])


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("ddp", {}, 2),
    ("manual_allreduce", {"bucket_mib": 0.5}, 2),
    ("manual_allreduce", {"algorithm": "halving_doubling"}, 3),
    ("manual_allreduce", {"algorithm": "ring", "bucket_mib": 1}, 3),
    ("sharded_server", {"bucket_mib": 1}, 3),
    ("sharded_server", {"share_parameters": True}, 2),
    ("parameter_server", {}, 2),
    ("parameter_server", {"transport": "ipc", "wire_dtype": "bfloat16", "part_mib": 0.5}, 2),
    ("parameter_server", {"share_parameters": True}, 2),
    ("parameter_server", {"servers": 2}, 2),
    ("parameter_server", {"transport": "collective"}, 2),
]


@pytest.mark.parametrize(("strategy", "options", "world_size"), CASES, ids=str)
def test_a_real_run_moves_the_planned_bytes_in_the_planned_buckets(
    strategy: str, options: dict[str, Any], world_size: int
) -> None:
    plan = _plan(strategy, options, world_size)
    processes = num_processes(strategy, world_size) + options.get("servers", 1) - 1
    results = run_distributed(_fit, processes, strategy, processes, options)[processes - world_size :]
    assert [num_bytes for num_bytes, _ in results] == plan.bytes_per_step[world_size]
    for _, found in results:
        if found is not None:
            assert found == [(set(bucket.names), bucket.num_bytes) for bucket in plan.buckets]


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "sharded_server", "parameter_server"])
def test_every_trained_parameter_travels_once(strategy: str) -> None:
    with torch.device("meta"):
        trained = {name: p for name, p in Layered().named_parameters() if p.requires_grad}
    plan = _plan(strategy, {}, 4)
    is_aligned = strategy == "sharded_server"
    sizes = [room_for(p, is_aligned) * p.element_size() for p in trained.values()]
    assert sum(bucket.num_bytes for bucket in plan.buckets) == sum(sizes)
    assert numbers_by_name(plan).keys() == trained.keys()
    for bucket in plan.buckets:
        if bucket.slices is not None:
            assert sum(bucket.slices[4]) == bucket.num_bytes


def test_a_tensor_that_servers_divide_is_in_several_buckets() -> None:
    plan = _plan("parameter_server", {"servers": 3}, 2)
    pieces = [name for bucket in plan.buckets for name in bucket.names if "[" in name]
    assert pieces
    assert {bucket.server for bucket in plan.buckets} == {0, 1, 2}
    assert len(numbers_by_name(plan)[pieces[0].partition("[")[0]]) > 1


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("cls", [RingAllReduce, HalvingDoublingAllReduce])
def test_planned_bytes_are_those_that_the_algorithm_reports(cls: Any, world_size: int) -> None:
    name = {RingAllReduce: "ring", HalvingDoublingAllReduce: "halving_doubling"}[cls]
    plan = _plan("manual_allreduce", {"algorithm": name}, world_size)
    for rank in range(world_size):
        algorithm = object.__new__(cls)
        algorithm.rank, algorithm.world_size = rank, world_size
        counts = [(bucket.num_bytes // bucket.dtype.itemsize, bucket.dtype.itemsize) for bucket in plan.buckets]
        wanted = sum(bytes_of(algorithm.plan(numel), itemsize) for numel, itemsize in counts)
        assert plan.bytes_per_step[world_size][rank] == wanted


def test_what_is_shown_and_written() -> None:
    output = shown("resnet50", "--buckets", "--world-size", "1,2", "--strategies", "ddp,parameter_server:servers=2")
    assert "strategy                    buckets   largest  1 process  2 processes" in output
    assert "ddp                               5  " in output
    assert "server 1" in output
    many = "manual_allreduce:bucket_mib=1"
    assert f"more: --strategies {many} shows all" in shown("resnet50", "--buckets", "--strategies", f"ddp,{many}")
    assert "more:" not in shown("resnet50", "--buckets", "--strategies", many)
    found = records("resnet50", "--buckets", "--strategies", "manual_allreduce", "--filter", "fc.")
    assert [record["buckets"] for record in found] == [{"manual_allreduce": [0]}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--buckets", "--strategies", "fsdp"], "--strategies fsdp: only ddp, manual_allreduce, "),
        (["resnet18", "--buckets", "--strategies", "nonsense"], "unknown --trainer.strategy 'nonsense'"),
        (["resnet18", "--buckets", "--strategies", "ddp:bucket_mib=1"], "ddp has no option 'bucket_mib'"),
        (["resnet18", "--buckets", "--strategies", "manual_allreduce:comm_hook=bf16"], "what comm_hook bf16 sends"),
        (["resnet18", "--buckets", "--strategies", "manual_allreduce:algorithm=hierarchical"], "depends on the hosts"),
        (["resnet18", "--buckets", "--strategies", ","], "--strategies names none"),
        (["resnet18", "--strategies", "ddp"], "--strategies is for --buckets"),
        (["--buckets", "--checkpoint", __file__], "--buckets needs MODEL: a file does not say what is trained"),
    ],
    ids=str,
)
def test_what_nobody_can_plan_is_said_in_one_line(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_parameters_that_cannot_travel_are_named() -> None:
    sparse, lazy, frozen = nn.Module(), nn.Module(), nn.Linear(2, 2).requires_grad_(False)
    sparse.table = nn.Parameter(torch.eye(3).to_sparse())
    lazy.layer = nn.LazyLinear(3)
    for module, message in ((sparse, "table is sparse"), (lazy, "layer.weight has no shape"), (frozen, "no trainable")):
        with pytest.raises(UserError, match=message):
            plan_strategy(module, Variant("ddp"), [2])
