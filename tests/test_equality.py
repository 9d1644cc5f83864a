"""The law of every exact strategy: the same weights as Lightning's DDP, to the bit where that is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_distributed
from training import num_processes, train, trainers_only

OURS = ["manual_allreduce", "parameter_server", "sharded_server"]

EPOCHS = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 10}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 3}),
    "clip_norm": ({}, {"gradient_clip_val": 0.1}),
    "clip_value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "batch_norm": ({"batch_norm": True}, {}),
    "batch_norm_accumulation": ({"batch_norm": True}, {"accumulate_grad_batches": 3}),
    "frozen": ({"frozen": True}, {}),
    "bf16_mixed": ({"batch_norm": True}, {"precision": "bf16-mixed"}),
    "adamw_clip_steplr": ({"optimizer": "adamw"}, {"gradient_clip_val": 0.1}),
    "two_optimizers": ("two_optimizers", {}),
    "incomplete_window": ({"optimizer": "adamw"}, {"accumulate_grad_batches": 4, **EPOCHS}),
    "two_schedules": ("two_schedules", EPOCHS),
}

_references: dict[Any, list[dict[str, torch.Tensor]]] = {}


def _ddp(case: str, world_size: int) -> list[dict[str, torch.Tensor]]:
    key = (case, world_size)
    if key not in _references:
        model, trainer = CASES[case]
        _references[key] = run_distributed(train, world_size, "ddp", world_size, model, trainer)
    return _references[key]


def _ours(strategy: str, case: str, world_size: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    model, trainer = CASES[case]
    processes = num_processes(strategy, world_size)
    return run_distributed(train, processes, strategy, processes, model, trainer, options)


def _assert_bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys()
    assert not different


def _assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", OURS)
def test_bitwise_equal_to_ddp_at_two_ranks(strategy: str, case: str) -> None:
    ours, reference = trainers_only(strategy, _ours(strategy, case, 2)), _ddp(case, 2)
    norm_of_pieces = strategy == "sharded_server" and "gradient_clip_val" in CASES[case][1] and case != "clip_value"
    for rank in range(2):  # buffers too: BatchNorm statistics differ between ranks, equally under both
        if norm_of_pieces:  # its squares are added up in another order
            _assert_close(ours[rank], reference[rank], 1e-6)
        else:
            _assert_bitwise(ours[rank], reference[rank])
    names = [name for name in ours[0] if "running" not in name]
    _assert_bitwise({name: ours[0][name] for name in names}, {name: ours[1][name] for name in names})


def test_the_trained_weights_are_not_the_initial_ones() -> None:
    untouched = run_distributed(train, 2, "ddp", 2, {}, {"max_steps": 0})[0]
    assert not torch.equal(_ddp("plain", 2)[0]["net.0.weight"], untouched["net.0.weight"])


@pytest.mark.parametrize("strategy", OURS)
def test_validation_sees_the_same_model_as_under_ddp(strategy: str) -> None:
    """BatchNorm statistics are rank 0's in validation, and the next training step goes on from them."""
    model, trainer = {"batch_norm": True}, {"max_steps": 9, "val_check_interval": 4, "limit_val_batches": 5}

    def run(name: str, processes: int) -> list[dict[str, torch.Tensor]]:
        return run_distributed(train, processes, name, processes, model, trainer, None, None, 8, True)

    ours, reference = run(strategy, num_processes(strategy, 2)), run("ddp", 2)
    assert "metric val/loss" in reference[0]
    for state in ours:  # the server's process ends with worker 0's metrics and weights
        _assert_bitwise(state, reference[1 if state is ours[-1] else 0])


@pytest.mark.parametrize(
    "options", [{"algorithm": "naive"}, {"overlap": False}, {"bucket_mib": 0.001}], ids=["naive", "no_overlap", "tiny"]
)
def test_every_way_to_all_reduce_gives_the_same_bits(options: dict[str, Any]) -> None:
    _assert_bitwise(_ours("manual_allreduce", "batch_norm", 2, **options)[0], _ddp("batch_norm", 2)[0])


@pytest.mark.parametrize(
    "options",
    [
        *({"transport": "naive"}, {"transport": "tcp"}, {"transport": "ipc"}, {"part_mib": 0.001}),
        *({"transport": "collective"}, {"transport": "collective", "part_mib": 0.001}),
        *({"share_parameters": True}, {"share_parameters": True, "part_mib": 0.001}),
    ],
    ids=[
        *("naive", "tcp", "ipc", "tiny_parts", "collective", "collective_tiny_parts"),
        *("in_place", "in_place_tiny_parts"),
    ],
)
@pytest.mark.parametrize("case", ["plain", "clip_norm", "two_optimizers"])
def test_every_transport_gives_the_same_bits(options: dict[str, Any], case: str) -> None:
    _assert_bitwise(_ours("parameter_server", case, 2, **options)[1], _ddp(case, 2)[0])


@pytest.mark.parametrize(
    "options",
    [{"transport": "collective"}, {"overlap": False}, {"bucket_mib": 0.001}],
    ids=["collective", "no_overlap", "tiny"],
)
def test_every_way_to_shard_gives_the_same_bits(options: dict[str, Any]) -> None:
    _assert_bitwise(_ours("sharded_server", "batch_norm", 2, **options)[0], _ddp("batch_norm", 2)[0])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("strategy", OURS)
def test_other_world_sizes_agree_with_ddp(strategy: str, world_size: int) -> None:
    ours, reference = _ours(strategy, "plain", world_size), _ddp("plain", world_size)
    for state in ours[1:]:  # the server's process ends with the trained weights as well
        _assert_bitwise(state, ours[0])
    for name, value in reference[0].items():
        # Three float32 terms round differently in another order (about 1e-7 a step, 20 steps), no more.
        torch.testing.assert_close(ours[0][name], value, rtol=0, atol=1e-6 if world_size == 3 else 0)


@pytest.mark.parametrize("strategy", OURS)
def test_unused_parameters_are_left_alone(strategy: str) -> None:
    """AdamW with weight decay moves a parameter with a zero gradient, but not one without a gradient."""
    model = {"unused": True, "optimizer": "adamw"}
    processes = num_processes(strategy, 2)
    ours = run_distributed(train, processes, strategy, processes, model)
    reference = run_distributed(train, 2, "ddp", 2, model, {}, {"find_unused_parameters": True})
    initial = run_distributed(train, 1, "ddp", 1, model, {"max_steps": 0}, {"find_unused_parameters": True})[0]
    _assert_bitwise(ours[-1], reference[1])
    assert torch.equal(ours[0]["extra.weight"], initial["extra.weight"])
