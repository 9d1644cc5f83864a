"""Says at the start of a fit what is going to run, where its figures go and how to look at them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .run_environment import gradsync_version, num_servers, process_group_backend, strategy_flag, strategy_options

_CLASSES_SHOWN = 5
DASHBOARD_URL = "http://localhost:6006/#custom_scalars"
"""Where TensorBoard opens our charts, on its default port."""


@final
class StartBanner(Callback):
    """Prints a few lines on rank zero when a fit starts. Nothing in here communicates."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print(banner(trainer, pl_module), flush=True)


def banner(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """The text, one labelled line per fact; lines without a fact are left out."""
    lines = {
        "strategy": _strategy(trainer),
        "processes": _processes(trainer),
        "model": _model(pl_module),
        **_data(trainer),
        **_places(trainer),
    }
    title = f"gradsync {gradsync_version()}, torch {version('torch')}, Lightning {version('lightning')}"
    return "\n".join([title, *(f"  {label:<12} {text}" for label, text in lines.items())])


def _strategy(trainer: pl.Trainer) -> str:
    options = ", ".join(f"{key}={value}" for key, value in strategy_options(trainer.strategy).items())
    return strategy_flag(trainer.strategy) + (f" ({options})" if options else "")


def _processes(trainer: pl.Trainer) -> str:
    servers = num_servers(trainer.strategy)
    training = f"{trainer.world_size} training" if not servers else f"{servers} serving + {trainer.world_size} training"
    backend = process_group_backend() or "no process group"
    return f"{training}, on {trainer.strategy.root_device.type}, {backend}"


def _model(pl_module: pl.LightningModule) -> str:
    parameters = [p for p in pl_module.parameters() if not is_lazy(p)]
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    name = getattr(pl_module, "arch", None) or type(pl_module).__name__
    return f"{name}, {total:,} parameters" + (f", {trainable:,} of them trained" if trainable != total else "")


def _data(trainer: pl.Trainer) -> dict[str, str]:
    datamodule: Any = getattr(trainer, "datamodule", None)
    lines = {"data": getattr(datamodule, "description", None) or ""}
    names = list(getattr(datamodule, "class_names", None) or [])
    if names:
        more = ", ..." if len(names) > _CLASSES_SHOWN else ""
        lines["classes"] = f"{len(names)}: {', '.join(map(str, names[:_CLASSES_SHOWN]))}{more}"
    return {label: text for label, text in lines.items() if text}


def _places(trainer: pl.Trainer) -> dict[str, str]:
    # Not `trainer.log_dir`: that property broadcasts, so that rank zero alone would wait for ever.
    logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
    if logger is None:
        return {"run folder": trainer.default_root_dir}
    return {
        "run folder": logger.log_dir,
        "TensorBoard": f"tensorboard --logdir {logger.save_dir}    then open {DASHBOARD_URL}",
    }
