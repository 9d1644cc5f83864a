"""``parameter_server`` with ``wire_dtype`` in real processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from training import newest_checkpoint, train

ADAMW = {"optimizer": "adamw"}
BF16 = {"wire_dtype": "bfloat16"}
State = dict[str, torch.Tensor]


def _train(options: dict[str, Any], trainer: dict[str, Any] | None = None, workers: int = 2, *more: Any) -> list[State]:
    processes = workers + options.get("servers", 1)
    return run_distributed(train, processes, "parameter_server", processes, ADAMW, trainer or {}, options, *more)


def _same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_transports_and_numbers_of_servers_end_with_the_same_unrounded_weights() -> None:
    first = _train(BF16)[0]
    more: list[dict[str, Any]] = [{"transport": "ipc"}, {"transport": "tcp", "part_mib": 0.001}]
    more += [{"servers": 2}, {"servers": 3, "transport": "ipc"}]
    for options in more:
        states = _train({**BF16, **options})
        assert all(_same(state, first) for state in (states[0], *states[-2:])), options
    assert any((value != value.bfloat16().float()).any() for value in first.values())
    for name, value in _train({})[0].items():
        # 8 bits of mantissa in parameters of about 0.3 and their gradients, 20 steps of at most 0.01
        torch.testing.assert_close(first[name], value, rtol=0, atol=0.05)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", [{}, {"mode": "async"}, {"mode": "bounded", "staleness": 1, "servers": 2}])
def test_every_mode_trains(mode: dict[str, Any], wire_dtype: str) -> None:
    trainer = {"max_steps": -1, "max_epochs": 2}
    states = _train({**mode, "wire_dtype": wire_dtype}, trainer, 2, None, 8, True)
    assert all(_same(state, states[-1]) for state in states[-2:])
    assert states[0]["metric val/loss"] < 0.8  # ln 3 = 1.1 at the start


def test_async_with_one_worker_is_sync() -> None:
    one, other = (_train({**BF16, "mode": mode}, None, 1)[1] for mode in ("sync", "async"))
    assert _same(one, other)


def _fit(folder: Path, options: dict[str, Any], max_epochs: int, workers: int, ckpt_path: str | None = None) -> State:
    trainer = {"max_steps": -1, "max_epochs": max_epochs, "enable_checkpointing": True}
    return _train(options, {**trainer, "default_root_dir": str(folder)}, workers, ckpt_path, 32)[-1]


def _newest(folder: Path) -> str:
    return max((newest_checkpoint(path) for path in folder.rglob("checkpoints")), key=lambda p: Path(p).stat().st_mtime)


@pytest.mark.parametrize("options", [BF16, {**BF16, "servers": 2, "transport": "ipc"}, {**BF16, "mode": "async"}])
def test_a_checkpoint_is_not_rounded_and_resumes_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    workers = 1 if "mode" in options else 2  # or the order of steps would differ
    whole = _fit(tmp_path / "whole", options, 3, workers)
    saved = torch.load(_newest(tmp_path / "whole"), weights_only=True)["state_dict"]
    assert _same(saved, whole)
    assert any((value != value.bfloat16().float()).any() for value in saved.values())
    _fit(tmp_path / "parts", options, 2, workers)
    resumed = _fit(tmp_path / "parts", options, 3, workers, _newest(tmp_path / "parts"))
    assert _same(resumed, whole)


def test_saving_a_checkpoint_does_not_change_the_run(tmp_path: Path) -> None:
    saving = _fit(tmp_path, BF16, 2, 2)
    silent = _train(BF16, {"max_steps": -1, "max_epochs": 2}, 2, None, 32)[-1]
    assert _same(saving, silent)


def _train_and_listen(rank: int, *args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(rank, *args)
    return [str(warning.message) for warning in heard]


def test_a_dtype_without_effect_is_told() -> None:
    args = ("parameter_server", 2, ADAMW, {}, {"wire_dtype": "float32"})
    heard = run_distributed(_train_and_listen, 2, *args)
    assert any("wire_dtype float32 has no effect" in text for text in heard[1])
