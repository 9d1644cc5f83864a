"""Random numbers go on where a checkpoint left them, on every rank: a resumed run draws what the whole one would."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from typing import Any, final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from .run_store import exchange, in_lockstep

KEY = "gradsync_random_state"
"""Where a checkpoint holds one text per rank."""
_PATIENCE = timedelta(seconds=60)


@final
class RandomState(Callback):
    """Saves the generators of Python, NumPy, torch and CUDA of every rank in step, and restores them.

    Where ranks go at paces of their own only the first one's is saved; another number of ranks starts anew.
    """

    def __init__(self) -> None:
        self._restored: str | None = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = _to_text(_collect_rng_states())
        states = {0: own}
        if trainer.world_size > 1 and in_lockstep(trainer.strategy):
            states = exchange(trainer, own, _PATIENCE)
        checkpoint[KEY] = [states[rank] for rank in sorted(states)]

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get(KEY, [])
        rank = trainer.global_rank  # a server's is beyond the world
        self._restored = states[rank] if len(states) == trainer.world_size > rank else None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is not None:  # now: loaders that begin draw a seed, as they did in the whole run
            _set_rng_states(_from_text(self._restored))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored is not None and batch_idx > 0:  # in the whole run they had begun before
            _set_rng_states(_from_text(self._restored))
        self._restored = None


def _to_text(states: dict[str, Any]) -> str:
    """As JSON: what travels between ranks is never unpickled."""
    kind, keys, *rest = states["numpy"]
    return json.dumps(
        {
            "python": states["python"],
            "numpy": [kind, keys.tolist(), *rest],
            "torch": _encode(states["torch"]),
            "torch.cuda": [_encode(state) for state in states["torch.cuda"]],
        }
    )


def _from_text(text: str) -> dict[str, Any]:
    states = json.loads(text)
    kind, keys, *rest = states["numpy"]
    return {
        "python": states["python"],
        "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
        "torch": _decode(states["torch"]),
        "torch.cuda": [_decode(state) for state in states["torch.cuda"]],
    }


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
