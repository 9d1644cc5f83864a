"""The models of docs/models.md, as the page has them: under every strategy DDP's weights, to the bit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed import run_distributed
from test_docs import ROOT, blocks_of
from torch.utils.data import DataLoader, TensorDataset
from training import make_strategy, make_trainer, num_processes, quiet, trainers_only

PAGE = ROOT / "docs" / "models.md"
MODELS = {
    "llama": ("llama.TinyLlama", "llama.Text"),
    "timm": ("timm_classifier.TimmClassifier", None),
    "mlp": ("mlp.Mlp", "mlp.Points"),
    "gan": ("gan.Gan", "mlp.Points"),
}
STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("page")
    names = [block.filename for block in blocks_of(PAGE) if block.filename]
    for block in blocks_of(PAGE):
        if block.filename:
            (folder / block.filename).write_text(block.content)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in names:
        sys.modules.pop(Path(name).stem, None)


def _made(path: str) -> Any:
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(module), name)()


def _images() -> DataLoader[Any]:
    images = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, torch.arange(64) % 10), batch_size=4)


def _fit(rank: int, strategy: str, processes: int, name: str) -> dict[str, torch.Tensor]:
    quiet()
    pl.seed_everything(1, verbose=False)
    model, data = MODELS[name]
    module = _made(model)
    # two optimizers step twice for each batch
    options = {"find_unused_parameters": True} if (strategy, name) == ("ddp", "gan") else {}
    trainer = make_trainer(
        make_strategy(strategy, options), processes, max_steps=-1, limit_train_batches=STEPS, max_epochs=1
    )
    trainer.fit(module, _made(data) if data else _images())
    return {name: value.clone() for name, value in module.state_dict().items()}


@cache
def fitted(strategy: str, name: str) -> list[dict[str, torch.Tensor]]:
    processes = num_processes(strategy, 2)
    return trainers_only(strategy, run_distributed(_fit, processes, strategy, processes, name))


@pytest.mark.parametrize("strategy", ["manual_allreduce", "sharded_server", "parameter_server"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_ddp(name: str, strategy: str) -> None:
    for ours, reference in zip(fitted(strategy, name), fitted("ddp", name), strict=True):
        assert ours.keys() == reference.keys()
        assert not [key for key in reference if not torch.equal(ours[key], reference[key])]


@pytest.mark.parametrize("name", MODELS)
def test_all_that_can_learn_has_changed(name: str) -> None:
    """Else equality would say nothing of the parts that stand still."""
    pl.seed_everything(1, verbose=False)
    module = _made(MODELS[name][0])
    module.configure_model()
    before = dict(module.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(value, fitted("ddp", name)[0][key])]
