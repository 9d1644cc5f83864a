"""Dropout of a resumed run: the very numbers that the uninterrupted one would have drawn, on every rank."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, newest_checkpoint, num_processes, quiet

from gradsync.callbacks import RandomState


class _Dropout(Mlp):
    """With the three kinds of random numbers that people use; ``seen`` is what was drawn, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(2, nn.Dropout(0.3))
        self.seen: list[tuple[float, float, float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return super().training_step(batch, index)


class _Replayed(DataLoader[Any]):
    """Goes on from its position, as a stateful loader does; draws a seed when it begins, as any loader does."""

    position = 0

    def __iter__(self) -> Any:
        start, _Replayed.position = _Replayed.position, 0
        return itertools.islice(super().__iter__(), start, None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _fit(rank: int, strategy: str, world: int, folder: str, max_steps: int, resume: str | None) -> Any:
    quiet()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank if resume is None else 100 + rank)
    saving = ModelCheckpoint(folder, every_n_train_steps=max_steps, save_top_k=-1)
    trainer = make_trainer(
        make_strategy(strategy),
        world,
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[saving, RandomState()],
        enable_checkpointing=True,
    )
    loader = _Replayed(make_data(), batch_size=8)
    model = _Dropout()
    if resume is not None:
        steps = torch.load(resume, weights_only=True)["global_step"]
        _Replayed.position = steps % (60 // trainer.world_size)
    trainer.fit(model, loader, ckpt_path=resume)
    return model.seen, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "sharded_server", "parameter_server"])
@pytest.mark.parametrize("steps", [7, 30])
def test_a_resumed_run_draws_the_same(strategy: str, steps: int, tmp_path: Path) -> None:
    """Saved in the middle of an epoch of 30 steps, and at its end."""
    world = num_processes(strategy, 2)
    whole = run_distributed(_fit, world, strategy, world, str(tmp_path / "whole"), 40, None)
    run_distributed(_fit, world, strategy, world, str(tmp_path / "first"), steps, None)
    saved = newest_checkpoint(tmp_path / "first")
    resumed = run_distributed(_fit, world, strategy, world, str(tmp_path / "second"), 40, saved)
    for (all_seen, state), (seen, resumed_state) in list(zip(whole, resumed, strict=True))[world - 2 :]:
        assert seen == all_seen[steps:]
        assert all(torch.equal(state[name], resumed_state[name]) for name in state)
    assert whole[-1][0] != whole[-2][0], "ranks draw numbers of their own"
