"""``on_worker_loss: continue``: a worker is killed at every step of a short run, and the others finish it."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from torch.utils.data import DataLoader
from torchmetrics import CatMetric
from training import Mlp, make_data, make_strategy, make_trainer, quiet

from gradsync.callbacks import EvenBatches

NUM_STEPS = 5
WORKERS = 3
VICTIM = 2


class Mortal(Mlp):
    """The last worker kills its process in training step ``at_step``: before it pushes its gradients."""

    def __init__(self, at_step: int) -> None:
        super().__init__(batch_norm=True)
        self.at_step = at_step
        self.labels = CatMetric()
        self.present: list[int] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.global_rank == VICTIM and self.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.labels.update(torch.tensor([float(self.global_rank)]))

    def on_validation_epoch_end(self) -> None:
        state = torch.cat([value.double().flatten() for value in self.state_dict().values()])
        assert (self.all_gather(state) == state).all(), "workers evaluate different models"
        self.present.append(len(self.labels.compute().unique()))
        self.labels.reset()


def _fit(rank: int, options: dict[str, Any], at_step: int) -> dict[str, Any]:
    quiet()
    pl.seed_everything(1, verbose=False)
    module = Mortal(at_step)
    strategy = make_strategy("parameter_server", {**options, "on_worker_loss": "continue", "step_timeout_s": 30})
    processes = WORKERS + options.get("servers", 1)
    trainer = make_trainer(strategy, processes, max_steps=-1, max_epochs=2, callbacks=[EvenBatches()])
    loader = DataLoader(make_data(8 * WORKERS * NUM_STEPS), batch_size=8)
    trainer.fit(module, loader, loader)
    return {
        "weights": module.net[0].weight.detach().clone(),
        "steps": trainer.global_step,
        "losses": strategy.losses(),
        "present": module.present,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


EVERY_STEP = range(NUM_STEPS + 1)


@pytest.mark.parametrize(
    ("options", "at_step"),
    [
        *(({}, step) for step in EVERY_STEP),
        *(({"mode": "async", "transport": "tcp"}, step) for step in EVERY_STEP),
        ({"mode": "bounded", "staleness": 1, "transport": "ipc"}, 2),
        ({"servers": 2}, 2),
        ({"servers": 2, "mode": "async"}, 3),
    ],
    ids=str,
)
def test_a_worker_killed_at_any_step_is_gone_without(options: dict[str, Any], at_step: int) -> None:
    first = options.get("servers", 1)
    found = run_distributed(_fit, WORKERS + first, options, at_step, killed=[first + VICTIM])
    trained = [result for result in found[first:] if result is not None]
    assert len(trained) == WORKERS - 1
    for result in trained:
        assert result["steps"] == 2 * NUM_STEPS
        assert [(loss.worker, loss.pushes) for loss in result["losses"]] == [(VICTIM, at_step)]
        assert result["present"][-1] == WORKERS - 1  # the metrics of the last epoch are those of the others
        assert torch.equal(result["weights"], trained[0]["weights"])
    assert torch.equal(found[0]["weights"], trained[0]["weights"])  # what the server's process ends with
