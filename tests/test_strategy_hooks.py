"""Communication hooks and algorithms under the strategy: options, checkpoints, equality, errors."""

from __future__ import annotations

import os
import resource
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet, train

from gradsync.comm import SharedMemoryError, reducer_for

HOOKS: dict[str, dict[str, Any]] = {
    "bf16": {"comm_hook": "bf16"},
    "powersgd": {
        "comm_hook": "powersgd",
        "comm_state": {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2},
    },
    "fp16_powersgd": {
        "comm_hook": "fp16_wrapper(powersgd)",
        "comm_state": {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2},
    },
    "int8": {"comm_hook": "int8"},
    "top_k": {"comm_hook": "top_k", "comm_state": {"share": 0.1}},
    "by_path": {"comm_hook": "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook"},
}
SEVERAL_BUCKETS = 0.002


def _train_with_checkpoints(rank: int, folder: str, epochs: int, resume: str | None, options: dict[str, Any]) -> Any:
    callback = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True, "callbacks": [callback]}
    return train(rank, "manual_allreduce", int(os.environ["WORLD_SIZE"]), {}, trainer, options, resume)


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_resumed_run_with_a_hook_equals_an_uninterrupted_one(hook: str, tmp_path: Path) -> None:
    options = {**HOOKS[hook], "bucket_mib": SEVERAL_BUCKETS}
    whole = run_distributed(_train_with_checkpoints, 2, str(tmp_path / "whole"), 2, None, options)
    saved = str(tmp_path / "whole" / "epoch=0.ckpt")
    resumed = run_distributed(_train_with_checkpoints, 2, str(tmp_path / "resumed"), 2, saved, options)
    for a, b in zip(resumed, whole, strict=True):
        _assert_same(a, b)
    _assert_same(whole[0], whole[1])


def test_three_ranks_resume_to_the_bit_because_the_bucket_order_is_saved(tmp_path: Path) -> None:
    options = {"algorithm": "native", "bucket_mib": SEVERAL_BUCKETS}
    whole = run_distributed(_train_with_checkpoints, 3, str(tmp_path / "whole"), 2, None, options)
    saved = str(tmp_path / "whole" / "epoch=0.ckpt")
    resumed = run_distributed(_train_with_checkpoints, 3, str(tmp_path / "resumed"), 2, saved, options)
    _assert_same(resumed[0], whole[0])


def test_what_compression_had_to_send_is_lost_with_a_warning_when_ranks_change(tmp_path: Path) -> None:
    options = HOOKS["top_k"]
    run_distributed(_train_with_checkpoints, 2, str(tmp_path / "a"), 1, None, options)
    saved = str(tmp_path / "a" / "epoch=0.ckpt")

    results = run_distributed(_warned_on_rank_zero, 3, str(tmp_path / "b"), saved, options)
    _assert_same(results[0][0], results[1][0])
    assert "the checkpoint is of 2 ranks with a communication hook, this run has 3 with one" in results[0][1]


def test_another_bucket_size_on_resume_is_taken_and_what_compression_had_to_send_is_not(tmp_path: Path) -> None:
    run_distributed(_train_with_checkpoints, 2, str(tmp_path / "a"), 1, None, HOOKS["powersgd"])
    saved = str(tmp_path / "a" / "epoch=0.ckpt")
    options = {**HOOKS["powersgd"], "bucket_mib": SEVERAL_BUCKETS}
    results = run_distributed(_warned_on_rank_zero, 2, str(tmp_path / "b"), saved, options)
    _assert_same(results[0][0], results[1][0])
    assert "it belongs to buckets of 25 MiB, not 0.002" in results[0][1]


def _warned_on_rank_zero(rank: int, folder: str, saved: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = _train_with_checkpoints(rank, folder, 2, saved, options)
    return state, " ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("algorithm", ["auto", "ring", "halving_doubling", "shared_memory", "native", "naive"])
def test_every_algorithm_trains_as_ddp_at_two_ranks(algorithm: str) -> None:
    reference = run_distributed(train, 2, "ddp", 2, {"batch_norm": True})
    options = {"algorithm": algorithm, "bucket_mib": SEVERAL_BUCKETS}
    ours = run_distributed(train, 2, "manual_allreduce", 2, {"batch_norm": True}, {}, options)
    for rank in range(2):
        _assert_same(ours[rank], reference[rank])


@pytest.mark.parametrize("world_size", [3, 4])
def test_native_rounds_as_ddp_with_more_ranks(world_size: int) -> None:
    """DDP's bucket layout, DDP's backend: the order of summation is the same too."""
    reference = run_distributed(train, world_size, "ddp", world_size, {"batch_norm": True})
    ours = run_distributed(
        train, world_size, "manual_allreduce", world_size, {"batch_norm": True}, {}, {"algorithm": "native"}
    )
    for rank in range(world_size):
        _assert_same(ours[rank], reference[rank])


def test_the_tuner_tries_every_size_and_training_stays_equal_to_ddps() -> None:
    """35 steps: the first, then six sizes with five steps each, then the chosen one."""
    reference = run_distributed(train, 2, "ddp", 2, {}, {"max_steps": 35})
    ours = run_distributed(_tuned, 2)
    _assert_same(ours[0][0], reference[0])
    assert ours[0][1] == ours[1][1] is not None


def _tuned(rank: int) -> Any:
    chosen: list[Any] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            chosen.append(trainer.strategy._reducer._tuner.best_mib)

    trainer = {"max_steps": 35, "callbacks": [Look()]}
    return train(rank, "manual_allreduce", 2, {}, trainer, {"bucket_mib": "auto"}), chosen[0]


def _options_after_fit(rank: int, options: dict[str, Any]) -> Any:
    quiet()
    strategy = make_strategy("manual_allreduce", options)
    make_trainer(strategy, 2, max_steps=2).fit(Mlp(), DataLoader(make_data(64), batch_size=8))
    return strategy.options["algorithm"]


def test_auto_says_what_it_chose() -> None:
    assert run_distributed(_options_after_fit, 2, {}) == ["shared_memory"] * 2


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "hierarchical"}, "hierarchical cannot run here: all ranks are on one host; shared_memory and"),
    ({"comm_hook": "nope"}, "there is no communication hook 'nope': give one of fp16, bf16"),
    ({"comm_hook": "no.such.hook"}, "'no.such.hook' cannot be imported: No module named 'no'"),
    ({"comm_hook": "bf16_wrapper"}, r"'bf16_wrapper' wraps a hook: write bf16_wrapper\(hook\)"),
    ({"comm_hook": "int8(bf16)"}, "'int8\\(bf16\\)': int8_hook does not wrap hooks"),
    ({"comm_hook": "os.getpid"}, "'os.getpid' cannot be called with \\(state, bucket\\)"),
    ({"comm_hook": "top_k", "comm_state": {"class_path": 5}}, "'5' cannot be imported"),
    ({"comm_hook": "top_k", "comm_state": {"share": "lots"}}, "share must be > 0 and <= 1, got lots"),
    ({"comm_hook": "top_k", "comm_state": {"share": 2}}, "share must be > 0 and <= 1, got 2"),
    ({"comm_hook": "bf16", "comm_state": {"share": 2}}, "bf16_compress_hook takes no options, got share"),
    ({"comm_hook": "int8", "algorithm": "ring"}, "a comm_hook does the communication itself"),
    ({"comm_state": {"share": 2}}, "there is no comm_hook"),
    (
        {"comm_hook": "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.batched_powerSGD_hook"},
        "batched_powerSGD_hook cannot run here: .*; powersgd works",
    ),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS)
def test_what_cannot_work_is_said_before_the_first_step(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RankFailed, match=f"UserError: strategy manual_allreduce: .*{text}"):
        run_distributed(_options_after_fit, 2, options)


def _other_model(rank: int) -> None:
    quiet()
    module = Mlp()
    if rank == 1:
        module.net[3] = nn.Linear(32, 32, bias=False)
    trainer = make_trainer(make_strategy("manual_allreduce"), 2)
    trainer.fit(module, DataLoader(make_data(64), batch_size=8))


def test_ranks_with_different_models_are_refused_by_name_on_every_rank() -> None:
    with pytest.raises(RankFailed) as caught:
        run_distributed(_other_model, 2)
    for rank in range(2):
        expected = f"[rank {rank}] gradsync.errors.UserError: ranks hold different models: rank 0 has 'net.3.bias'"
        assert expected in str(caught.value)


def _too_little_memory(rank: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    model = nn.Linear(2000, 2000)
    try:
        reducer_for(model, algorithm="shared_memory").close()
    except SharedMemoryError as error:
        return str(error)
    return None


def test_too_little_shared_memory_is_an_error_on_all_ranks() -> None:
    first, second = run_distributed(_too_little_memory, 2)
    assert first == second
    assert "MiB of shared memory" in first


def _freeze_one_of_two(rank: int, options: dict[str, Any]) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    reducer = reducer_for(model, **options)
    last = torch.empty(0)
    for step in range(12):
        if step == 4:
            last = model[0].weight.grad.clone()
            model[0].requires_grad_(False)
        model[1].weight.grad = model[1].bias.grad = None
        with reducer.backward_pass():
            (1000 * model(torch.full((2, 8), rank + 1.0))).sum().backward()
    view = next(slot.view for p, slot in reducer._slots.items() if p is model[0].weight)
    num_nonzero = model[1].weight.grad.count_nonzero().item()
    return num_nonzero, view.abs().max().item(), torch.equal(model[0].weight.grad, last)


@pytest.mark.parametrize("options", [{"algorithm": "native"}, {"algorithm": "shared_memory"}, HOOKS["top_k"]])
def test_what_is_frozen_in_mid_run_no_longer_travels(options: dict[str, Any]) -> None:
    """Its last gradient lies in a bucket with others: summed again in each step, it would grow and crowd them out."""
    for num_nonzero, travelling, keeps_its_gradient in run_distributed(_freeze_one_of_two, 2, options):
        assert num_nonzero > 0
        assert travelling == 0 or "comm_hook" in options  # which still sends what it held back, and no more
        assert keeps_its_gradient


def _bytes(rank: int, options: dict[str, Any]) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    reducer = reducer_for(model, **options)
    for _ in range(4):
        with reducer.backward_pass():
            model(torch.ones(2, 64)).sum().backward()
        step = reducer.timeline.take_step()
        assert step is not None
    return step.num_bytes


NUMEL = 2 * (64 * 64 + 64)
RING_OF_TWO = 2  # sent plus received, as a multiple of the data: 2 (n-1)/n each way
POWERSGD_NUMEL = 2 * ((64 + 64) * 2 + 64)  # P and Q of rank 2 for each matrix, and the biases as they are


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algorithm": "native"}, RING_OF_TWO * 4 * NUMEL),
        ({"algorithm": "shared_memory"}, RING_OF_TWO * 4 * NUMEL),
        ({"comm_hook": "bf16"}, RING_OF_TWO * 2 * NUMEL),
        ({"comm_hook": "powersgd", "comm_state": HOOKS["powersgd"]["comm_state"]}, RING_OF_TWO * 4 * POWERSGD_NUMEL),
        # an all-gather of two sends and receives one message: a value and an index each
        ({"comm_hook": "top_k", "comm_state": {"share": 0.25}}, 2 * 8 * NUMEL // 4),
    ],
    ids=["native", "shared_memory", "bf16", "powersgd", "top_k"],
)
def test_counted_bytes_are_what_theory_says(options: dict[str, Any], expected: int) -> None:
    assert run_distributed(_bytes, 2, options) == [expected] * 2
