"""Lightning Fabric with our strategy: the law is Fabric's own DDP, to the bit at 2 ranks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from distributed import RankFailed, run_distributed
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader
from training import Mlp, make_data, quiet

import gradsync
from gradsync import ManualAllReduceStrategy, UserError
from gradsync.strategies import FabricManualAllReduceStrategy

State = dict[str, torch.Tensor]
OURS = "manual_allreduce"


def _launched(strategy: Any, **options: Any) -> Fabric:
    quiet()
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **options)
    fabric.launch()
    fabric.seed_everything(1 + fabric.global_rank, verbose=False)  # rank 0's weights have to win
    return fabric


def _net(batch_norm: bool = False, frozen: bool = False) -> nn.Module:
    return Mlp(batch_norm=batch_norm, frozen=frozen).net


def _state(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _train(
    rank: int,
    strategy: Any,
    model: dict[str, bool] | None = None,
    accumulate: int = 1,
    clip: dict[str, float] | None = None,
    fabric_options: dict[str, Any] | None = None,
) -> State:
    """20 batches; in between one forward pass in eval mode, whose buffers have to be rank 0's as well."""
    fabric = _launched(strategy, **(fabric_options or {}))
    net = _net(**(model or {}))
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    loader = fabric.setup_dataloaders(DataLoader(make_data(320), batch_size=8, shuffle=True))
    seen = {}
    for number, batch in enumerate(loader):
        accumulates = number % accumulate != accumulate - 1
        with fabric.no_backward_sync(net, enabled=accumulates):
            fabric.backward(_loss(net, batch))
        if accumulates:
            continue
        if clip:
            fabric.clip_gradients(net, optimizer, **clip)
        optimizer.step()
        optimizer.zero_grad()
        if number == 11:
            net.eval()
            with torch.no_grad():
                seen["evaluated"] = net(batch[0])
            net.train()
    return {**_state(net), **seen}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_norm": {"model": {"batch_norm": True}},
    "frozen": {"model": {"frozen": True}},
    "accumulation": {"accumulate": 3},
    "batch_norm_accumulation": {"model": {"batch_norm": True}, "accumulate": 3},
    "clip_norm": {"clip": {"max_norm": 0.1}},
    "clip_value": {"clip": {"clip_val": 0.01}},
    "bf16_mixed": {"model": {"batch_norm": True}, "fabric_options": {"precision": "bf16-mixed"}},
}


def _run(fn: Callable[..., Any], *args: Any, **keywords: Any) -> list[Any]:
    return run_distributed(lambda rank: fn(rank, *args, **keywords), 2)


def _assert_bitwise(ours: list[State], reference: list[State]) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.keys() == theirs.keys()
        assert not [name for name in theirs if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("case", CASES)
def test_bitwise_equal_to_fabrics_ddp_at_two_ranks(case: str) -> None:
    reference = _run(_train, "ddp", **CASES[case])
    _assert_bitwise(_run(_train, OURS, **CASES[case]), reference)
    untouched = _net(**CASES[case].get("model", {})).state_dict()
    assert not torch.equal(untouched["5.weight"], reference[0]["5.weight"])


@pytest.mark.parametrize(
    "options",
    [{"algorithm": "naive"}, {"algorithm": "native"}, {"algorithm": "ring"}, {"overlap": False}, {"bucket_mib": 0.001}],
    ids=str,
)
def test_every_option_gives_the_same_bits(options: dict[str, Any]) -> None:
    ours = _run(lambda rank: _train(rank, FabricManualAllReduceStrategy(**options), {"batch_norm": True}))
    _assert_bitwise(ours, _run(_train, "ddp", {"batch_norm": True}))


def _adversaries(rank: int, strategy: Any) -> State:
    """A GAN: two models and optimizers. The generator's pass also reaches the discriminator, not the other way."""
    fabric = _launched(strategy)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    discriminator = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    generator, first = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=1e-2))
    discriminator, second = fabric.setup(discriminator, torch.optim.Adam(discriminator.parameters(), lr=1e-2))
    for real, _ in fabric.setup_dataloaders(DataLoader(make_data(160), batch_size=8)):
        fake = generator(torch.randn(8, 4))
        second.zero_grad()
        fabric.backward(discriminator(fake.detach()).mean() - discriminator(real).mean())
        second.step()
        first.zero_grad()
        fabric.backward(-discriminator(fake).mean())
        first.step()
    states = _state(generator), _state(discriminator)
    return {f"{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}


def test_two_models_with_a_backward_pass_each() -> None:
    _assert_bitwise(_run(_adversaries, OURS), _run(_adversaries, "ddp"))


def _bytes_per_model(rank: int) -> list[int]:
    fabric = _launched(OURS)
    models = [fabric.setup(nn.Linear(4, 4)) for _ in range(2)]
    taken = []
    for used in models:
        fabric.backward(used(torch.ones(2, 4)).sum())
        for model in models:
            step = model._forward_module.reducer.timeline.take_step()
            taken.append(step.num_bytes if step else 0)
    return taken


def test_a_model_that_a_pass_does_not_reach_sends_nothing() -> None:
    assert _run(_bytes_per_model) == [[160, 0, 0, 160]] * 2  # a ring of two: 80 bytes each way


def _shared_encoder(rank: int, strategy: Any) -> State:
    fabric = _launched(strategy)
    encoder = nn.Linear(10, 8)
    models = [fabric.setup(nn.Sequential(encoder, nn.ReLU(), nn.Linear(8, 3))) for _ in range(2)]
    optimizer = fabric.setup_optimizers(torch.optim.SGD({p: 0 for m in models for p in m.parameters()}, lr=0.1))
    for batch in fabric.setup_dataloaders(DataLoader(make_data(80), batch_size=8)):
        optimizer.zero_grad()
        fabric.backward(_loss(models[0], batch) + _loss(models[1], batch))
        optimizer.step()
    return {f"{n}.{name}": value for n, model in enumerate(models) for name, value in _state(model).items()}


def test_a_parameter_of_two_models_is_averaged_once() -> None:
    _assert_bitwise(_run(_shared_encoder, OURS), _run(_shared_encoder, "ddp"))


def _odd_modules(rank: int) -> list[bool]:
    """All parameters frozen; no parameters; the same module once more. Then the first is unfrozen."""
    fabric = _launched(OURS)
    frozen = fabric.setup_module(nn.Linear(3, 3).requires_grad_(False))
    fabric.setup_module(nn.ReLU())
    net = nn.Linear(3, 3)
    fabric.setup_module(net)
    again = fabric.setup_module(net)
    results = []
    for _ in range(4):
        fabric.backward(again(frozen(torch.full((1, 3), 1.0 + rank))).sum())
        results.append(frozen.weight.grad is None)
        frozen.requires_grad_(True)
    gradients = torch.cat([net.weight.grad.flatten(), frozen.weight.grad.flatten()])
    return [*results, torch.equal(*fabric.all_gather(gradients))]


def test_modules_without_anything_to_reduce_take_part() -> None:
    assert _run(_odd_modules) == [[True, False, False, False, True]] * 2


class _Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.layer = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(x))

    def step(self, batch: Any) -> torch.Tensor:
        return _loss(self, batch)


def _other_forward(rank: int, strategy: Any) -> State:
    fabric = _launched(strategy, precision="bf16-mixed")
    model = _Steps()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.mark_forward_method("step")
    for batch in fabric.setup_dataloaders(DataLoader(make_data(80), batch_size=8)):
        fabric.backward(model.step(batch))
        optimizer.step()
        optimizer.zero_grad()
    return _state(model)


def test_a_marked_forward_method_shares_buffers_and_autocasts() -> None:
    _assert_bitwise(_run(_other_forward, OURS), _run(_other_forward, "ddp"))


def _save_and_load(rank: int, strategy: Any, folder: str) -> list[State]:
    fabric = _launched(strategy)
    states: list[State] = []
    for path in (None, f"{folder}/{OURS if strategy == OURS else 'ddp'}.pt"):
        net = _net(batch_norm=True)
        net, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        progress = {"net": net, "optimizer": optimizer, "epoch": 7}
        if path:
            progress["epoch"] = 0
            assert fabric.load(path, progress) == {}
            assert progress["epoch"] == 7
        batches = list(fabric.setup_dataloaders(DataLoader(make_data(160), batch_size=8)))
        for number, batch in enumerate(batches[5:] if path else batches):
            if not path and number == 5:
                fabric.save(f"{folder}/{OURS if strategy == OURS else 'ddp'}.pt", progress)
            fabric.backward(_loss(net, batch))
            optimizer.step()
            optimizer.zero_grad()
        states.append(_state(net))
    return states


@pytest.mark.parametrize("strategy", [OURS, "ddp"])
def test_a_loaded_checkpoint_continues_as_if_uninterrupted(strategy: str, tmp_path: Path) -> None:
    for whole, resumed in _run(_save_and_load, strategy, str(tmp_path)):
        # buffers differ on rank 1: the file holds rank 0's, as under DDP
        _assert_bitwise(
            [{k: v for k, v in resumed.items() if "weight" in k}], [{k: whole[k] for k in whole if "weight" in k}]
        )
    assert set(torch.load(tmp_path / f"{strategy}.pt")["net"]) == set(_net(batch_norm=True).state_dict())


def _collectives(rank: int) -> Any:
    fabric = _launched(OURS)
    fabric.barrier()
    mine = torch.tensor([1.0 + rank])
    sampled = sorted(int(x) for x in torch.cat(list(fabric.setup_dataloaders(DataLoader(range(10), batch_size=2)))))
    return (
        fabric.world_size,
        fabric.global_rank,
        fabric.all_gather(mine).flatten().tolist(),
        fabric.all_reduce(mine.clone()).item(),
        fabric.all_reduce(mine.clone(), reduce_op="sum").item(),
        fabric.broadcast({"from": rank}, src=1),
        fabric.strategy.reduce_boolean_decision(rank == 0),
        sampled,
    )


def test_collectives_and_samplers() -> None:
    common = [1.0, 2.0], 1.5, 3.0, {"from": 1}, False
    assert _run(_collectives) == [(2, rank, *common, [*range(rank, 10, 2)]) for rank in range(2)]


def _compiled(rank: int, strategy: Any) -> State:
    fabric = _launched(strategy)
    net = _net(batch_norm=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled, optimizer = fabric.setup(torch.compile(net, backend="eager"), optimizer)
    for number, batch in enumerate(fabric.setup_dataloaders(DataLoader(make_data(96), batch_size=8))):
        with fabric.no_backward_sync(compiled, enabled=number % 2 == 0):
            fabric.backward(_loss(compiled, batch))
        optimizer.step()
        optimizer.zero_grad()
    return _state(net)


def test_a_compiled_module_trains_as_under_ddp() -> None:
    _assert_bitwise(_run(_compiled, OURS), _run(_compiled, "ddp"))


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"algorithm": "bogus"}, "algorithm must be one of auto, .*native.*, got 'bogus'"),
        ({"bucket_mib": 0}, "bucket_mib must be > 0 MiB or auto, got 0"),
        ({"bucket_mib": "many"}, "bucket_mib must be > 0 MiB or auto, got 'many'"),
        ({"start_timeout_s": 0}, "start_timeout_s must be > 0 seconds, got 0"),
        ({"step_timeout_s": -1}, "step_timeout_s must be > 0 seconds, got -1"),
        ({"process_group_backend": "mpi"}, "process_group_backend must be gloo or nccl, got 'mpi'"),
        ({"backend_options": {"NCCL_ALGOS": "Ring"}}, "^backend_options: unknown name .*nearest: NCCL_ALGO"),
    ],
)
def test_a_wrong_option_is_refused_before_processes_start(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        FabricManualAllReduceStrategy(**options)


def test_the_options_are_those_of_the_trainers_strategy() -> None:
    def names(*functions: Any) -> dict[str, Any]:
        parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
        return {p.name: p.default for p in parameters if p.name not in ("self", "kwargs")}

    trainers = names(ManualAllReduceStrategy.__init__, gradsync.strategies.CollectiveStrategy.__init__)
    assert names(FabricManualAllReduceStrategy.__init__) == trainers


def _set_up(rank: int, options: dict[str, Any], num_models: int = 1, width: int = 3) -> str:
    fabric = _launched(FabricManualAllReduceStrategy(**options))
    for _ in range(num_models - 1):
        fabric.setup_module(nn.Linear(3, 3))
    with pytest.raises(UserError) as caught:
        fabric.setup_module(nn.Linear(3, width + rank * (width - 3)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([{"comm_hook": "nonsense"}], "strategy manual_allreduce: there is no communication hook 'nonsense'"),
        ([{"comm_hook": "bf16", "algorithm": "ring"}], "leave out algorithm 'ring'"),
        ([{"algorithm": "hierarchical"}], "all ranks are on one host"),
        ([{}, 1, 4], "ranks hold different models: rank 0 has 'weight'"),
        ([{"comm_hook": "top_k", "comm_state": object()}, 2], "comm_state is the state of one model"),
    ],
    ids=["hook", "both", "hierarchical", "models", "state"],
)
def test_what_cannot_run_is_refused_on_all_ranks(arguments: list[Any], text: str) -> None:
    assert all(text in message for message in _run(_set_up, *arguments))


def _backward_of_the_loss_itself(rank: int) -> None:
    fabric = _launched(OURS)
    fabric.setup_module(nn.Linear(3, 3))(torch.ones(3)).sum().backward()


def test_backward_without_fabric_is_refused() -> None:
    with pytest.raises(RankFailed, match=r"call `fabric.backward\(loss\)`"):
        _run(_backward_of_the_loss_itself)


# -- as a script -------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from lightning.fabric import Fabric
import gradsync
fabric = Fabric(accelerator="cpu", devices=2, strategy="manual_allreduce")
fabric.launch()
assert type(fabric.strategy) is gradsync.strategies.FabricManualAllReduceStrategy
model = torch.nn.Linear(10, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(5):
    optimizer.zero_grad()
    fabric.backward(model(torch.full((4, 10), float(fabric.global_rank + step))).sum())
    optimizer.step()
weights = fabric.all_gather(model.weight.detach())
assert torch.equal(weights[0], weights[1])
fabric.print(f"{fabric.world_size} ranks agree")
"""


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_a_script_runs_by_itself_and_under_torchrun(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    ended = run_command([sys.executable, *launcher, "train.py"], tmp_path)
    assert ended.code == 0, ended.output
    assert ended.output.count("2 ranks agree") == 1
    assert not ended.orphans


def test_ddp_is_left_alone() -> None:
    assert isinstance(Fabric(accelerator="cpu", devices=2, strategy="ddp").strategy, DDPStrategy)
