"""A lost worker's place is taken by another process: it goes on where the first worker is, and all count it in."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from faulty import EPOCHS_AFTER, VICTIM, WORKERS, Returning
from torch.utils.data import DataLoader
from training import make_data, make_strategy, make_trainer, quiet

from gradsync.callbacks import EvenBatches
from gradsync.strategies.worker_return import INCARNATION

BATCH, BATCHES = 8, 4


def _fit(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    first = options.get("servers", 1)
    if rank == first + VICTIM and (child := os.fork()) > 0:  # this process is the worker's second incarnation
        os.waitpid(child, 0)
        os.environ[INCARNATION] = "1"
    quiet()
    pl.seed_everything(1, verbose=False)
    module = Returning()
    options = {**options, "on_worker_loss": "continue", "step_timeout_s": 60}
    strategy = make_strategy("parameter_server", options)
    limits = {"max_steps": -1, "max_epochs": 400, "num_sanity_val_steps": 0}
    trainer = make_trainer(strategy, WORKERS + first, callbacks=[EvenBatches()], **limits)
    loader = DataLoader(make_data(BATCH * WORKERS * BATCHES), batch_size=BATCH)
    trainer.fit(module, loader, loader)
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items() if "net" in name},
        "position": (trainer.current_epoch, trainer.global_step),
        "present": module.present,
        "losses": strategy.losses(),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"transport": "tcp"}, {"servers": 2, "transport": "ipc"}],
    ids=str,
)
def test_a_new_process_takes_a_lost_workers_place(options: dict[str, Any]) -> None:
    first = options.get("servers", 1)
    found = run_distributed(_fit, WORKERS + first, options)
    trained = found[first:]
    for result in trained:
        assert [(loss.worker, loss.pushes) for loss in result["losses"]] == [(VICTIM, 1)]
        assert result["present"][-EPOCHS_AFTER:] == [WORKERS] * EPOCHS_AFTER  # metrics are over all of them again
    counts = trained[0]["present"]
    assert counts[0] == WORKERS - 1  # they were over the others in between
    assert counts == sorted(counts)
    # All take every step together, and end with the same weights, as the server's process does.
    assert len({result["position"] for result in trained}) == 1
    for result in [found[0], *trained]:
        for name, value in trained[0]["state"].items():
            assert torch.equal(result["state"][name], value), name
