"""The model that ``gradsync fit`` would train: any LightningModule, by the same arguments and configurations."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from ..errors import UserError
from ..lightning_cli import GradsyncCLI
from ..strategy_flag import expand
from ..trainer import Trainer
from .building import build
from .entries import Listing, list_module

_BAD_CLASS = re.compile(r"Problem with given class_path .+?(?= - |$)")


def load(arguments: Sequence[str], with_values: bool) -> Listing:
    """Data are looked at, and prepared, only for a model that cannot be made without (for its number of classes, say).

    Raises:
        UserError: ``gradsync fit`` refuses the arguments, or the model cannot be made.
    """
    config = fit_config(arguments)
    try:
        module = build(lambda: _make(config), with_values)
    except Exception:
        if config.get("data") is None:
            raise
        data = _instantiate(config, "data")
        with _silent():
            data.prepare_data()
            data.setup("fit")
        module = build(lambda: _make(config, data), with_values)
    title = config["model"]["class_path"].rpartition(".")[2]
    built_with = {"model": config["model"], **({"data": config["data"]} if config.get("data") else {})}
    return list_module(title, module, built_with)


def fit_config(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``gradsync fit ARGUMENTS --print_config`` prints. Raises: UserError, for arguments that it refuses."""
    before, output, errors = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["gradsync", *expand(["fit", *arguments, "--print_config"])]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _silent():
            GradsyncCLI.from_command_line()
    except SystemExit as end:
        if end.code:
            said = " ".join(errors.getvalue().rpartition("error: ")[2].split())
            named = _BAD_CLASS.search(said)  # beside which the parser tells all else that it has tried
            raise UserError(f"no model of gradsync fit: {named[0] if named else said}") from end
    finally:
        sys.argv = before
    return yaml.safe_load(output.getvalue())


def _make(config: dict[str, Any], data: pl.LightningDataModule | None = None) -> nn.Module:
    if (seed := config.get("seed_everything")) is not None and not isinstance(seed, bool):
        pl.seed_everything(seed, verbose=False)
    module: pl.LightningModule = _instantiate(config, "model")
    if data is not None:
        with _silent():
            module.trainer = Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
        vars(module.trainer)["datamodule"] = data  # as Lightning attaches it
    module.configure_model()
    return module


def _instantiate(config: dict[str, Any], key: str) -> Any:
    """The model or the data module, apart from trainer, callbacks and logger."""
    parser = LightningArgumentParser()
    base = {"model": pl.LightningModule, "data": pl.LightningDataModule}[key]
    parser.add_lightning_class_args(base, key, subclass_mode=True)
    return parser.instantiate_classes(parser.parse_object({key: config[key]}))[key]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without Lightning's lines on seeds, devices and what else a training would want to know."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
