"""LightningCLI with our defaults: model, data, run folder, communication figures and the result file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from .callbacks import CommunicationMonitor, Dashboard, ResultsWriter, StartBanner, default_progress_callbacks
from .datamodules import ImageNetDataModule
from .errors import UserError
from .modules import ImageClassifier
from .strategy_flag import class_path
from .trainer import Trainer

_CHILD_PATIENCE_S = 60.0


@final
class GradsyncCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; any LightningModule and DataModule by class path."""

    @classmethod
    def from_command_line(cls) -> GradsyncCLI:
        """Parse ``sys.argv`` and run the subcommand."""
        return cls(
            pl.LightningModule,
            pl.LightningDataModule,
            trainer_class=Trainer,
            trainer_defaults={"max_epochs": 3, "log_every_n_steps": 10},
            seed_everything_default=42,
            save_config_kwargs={"overwrite": True},  # https://github.com/Lightning-AI/pytorch-lightning/issues/17115
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "model": {"class_path": class_path(ImageClassifier)},
                "data": {"class_path": class_path(ImageNetDataModule)},
            }
        )
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="folder of the run (default: runs/STRATEGY-TIME)"
        )
        parser.add_argument(
            "--results", type=str | None, default=None, help="result file (default: in the run folder, by strategy)"
        )
        parser.add_argument(
            "--progress_every_n_steps",
            type=int | None,
            default=None,
            help="steps from one progress line to the next where output is no terminal",
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        fitting = self.subcommand == "fit"
        run_dir = Path(self._get(self.config, "run_dir") or self._default_run_dir(config))
        if config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(run_dir.parent, name=None, version=run_dir.name) if fitting else False
        if config.get("default_root_dir") is None:
            config["default_root_dir"] = str(run_dir)
        config["callbacks"] = [*(config.get("callbacks") or []), *self._own_callbacks(config, run_dir, fitting)]
        return super().instantiate_trainer(**kwargs)

    @staticmethod
    def _default_run_dir(config: Any) -> str:
        strategy = config["strategy"]
        name = strategy if isinstance(strategy, str) else getattr(strategy, "strategy_name", type(strategy).__name__)
        return f"runs/{name}-{datetime.now():%Y-%m-%d_%H-%M-%S}"

    def _own_callbacks(self, config: Any, run_dir: Path, fitting: bool) -> list[pl.Callback]:
        """Ours come last: what they report then includes what the user's own callbacks cost."""
        if config.get("barebones") or config.get("fast_dev_run"):
            return []
        callbacks: list[pl.Callback] = [CommunicationMonitor()]
        if config.get("enable_progress_bar") is not False:
            callbacks += default_progress_callbacks(self._get(self.config, "progress_every_n_steps"))
        if not fitting:
            return callbacks
        results = self._get(self.config, "results")
        path = Path(results) if results else None
        writer = ResultsWriter(path.parent if path else run_dir, path.name if path else None)
        self._dump_config()
        writer.config = self.config_dump
        callbacks += [writer, Dashboard(), StartBanner()]
        if config.get("enable_checkpointing") is not False and not any(
            isinstance(c, ModelCheckpoint) for c in config.get("callbacks") or []
        ):
            callbacks.append(ModelCheckpoint(dirpath=run_dir / "checkpoints", save_last=True))
        return callbacks

    def wait_for_children(self) -> None:
        """Let the processes that this one started finish: they end with it.

        Raises:
            UserError: one of them ended with an error, or does not end.
        """
        launcher = self.trainer.strategy.launcher
        for process in launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []:
            try:
                code = process.wait(_CHILD_PATIENCE_S)
            except TimeoutExpired:
                raise UserError(
                    f"process {process.pid} of this run did not end within {_CHILD_PATIENCE_S:g} s"
                ) from None
            if code:
                raise UserError(f"process {process.pid} of this run ended with code {code} after training")
