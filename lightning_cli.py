"""LightningCLI with our defaults: model, data, run folder, communication figures and the result file."""

from __future__ import annotations

import errno
import os
import tempfile
from datetime import datetime
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, final

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from .callbacks import (
    CommunicationMonitor,
    Dashboard,
    EvenBatches,
    FailureChannel,
    NonfiniteGuard,
    RandomState,
    ResultsWriter,
    RunSummary,
    Snapshots,
    StartBanner,
    StopOnSignal,
    TraceWriter,
    default_progress_callbacks,
)
from .callbacks.nonfinite_guard import OnNonfinite
from .callbacks.run_environment import strategy_flag
from .callbacks.snapshots import SNAPSHOT
from .checkpoints import BackgroundCheckpointIO, DurableCheckpointIO, is_local
from .datamodules import ImageNetDataModule
from .errors import UserError
from .modules import ImageClassifier
from .processes import RUN_DIR, is_started_by_rank_zero, is_supervised
from .restarts import Restart
from .strategies.ddp_restart import form_group_after_restart
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
            "--variant",
            type=str | None,
            default=None,
            metavar="TEXT",
            help="what tells this run from others of its strategy in results and reports, mode=async for instance",
        )
        parser.add_argument(
            "--progress_every_n_steps",
            type=int | None,
            default=None,
            help="steps from one progress line to the next where output is no terminal",
        )
        parser.add_argument(
            "--async_checkpoints", type=bool, default=False, help="train on while a checkpoint is written to the disk"
        )
        parser.add_argument(
            "--snapshot_every_n_steps",
            type=NonNegativeInt,
            default=0,
            help="optimizer steps from one checkpoint to the next; 0: only at the end of epochs",
        )
        parser.add_argument(
            "--max_restarts",
            type=NonNegativeInt,
            default=0,
            help="how often a run on one host that fails is started again, from its newest checkpoint",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=OnNonfinite,
            default="stop",
            help="what happens at a NaN or infinite gradient: stop the run, skip the step, or ignore it",
        )
        parser.add_argument(
            "--trace_steps",
            type=str | None,
            default=None,
            help="steps of which trace.json in the run folder shows what every process did, 10-12 for instance",
        )

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning reads the model's hyperparameters from it, before any plugin could tell that it is damaged.
        self.subcommand = self.config["subcommand"]  # Lightning sets it a little later
        settings = self.config[self.subcommand]
        if (path := settings.get("ckpt_path")) and Path(path).is_file():
            settings["ckpt_path"] = str(self._checkpoint_io().good(Path(path)))
        super()._parse_ckpt_path()

    def _checkpoint_io(self) -> DurableCheckpointIO:
        """Only a fit goes on from another checkpoint than was asked for."""
        return DurableCheckpointIO(falls_back=self.subcommand == "fit")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self._make_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and is_local(callback.dirpath):
                _check_writable(Path(callback.dirpath))
        form_group_after_restart(trainer.strategy)
        if (restart := Restart.this()) and (saved := _newest_since(restart.begun, trainer)):
            self.config_init["fit"]["ckpt_path"] = str(saved)
        return trainer

    def _make_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        config["devices"] = _devices(config["devices"])
        config["plugins"] = self._plugins(config.get("plugins"))
        if self.subcommand != "fit":  # an evaluation prints its figures and leaves no files
            self.save_config_callback = None
            config["logger"], config["enable_checkpointing"] = config.get("logger") or False, False
            config["callbacks"] = [*(config.get("callbacks") or []), *self._observers(config)]
            return super().instantiate_trainer(**kwargs)
        if self._get(self.config, "ckpt_path") == "last" and self._get(self.config, "run_dir") is None:
            raise UserError("--ckpt_path last needs --run_dir DIR, the folder of the run that is to go on")
        run_dir = Path(self._get(self.config, "run_dir") or self._default_run_dir(config))
        os.environ[RUN_DIR] = str(run_dir)
        if config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(
                run_dir.parent, name=None, version=run_dir.name, default_hp_metric=False
            )
        if config.get("default_root_dir") is None:
            config["default_root_dir"] = str(run_dir)
        # Ours come last: what they report then includes what the user's own callbacks cost.
        own = [*self._observers(config), *self._writers(config, run_dir)]
        guards = [FailureChannel(), EvenBatches()]  # before anything that communicates
        config["callbacks"] = [*guards, *(config.get("callbacks") or []), *own]
        return super().instantiate_trainer(**kwargs)

    def _plugins(self, given: Any) -> list[Any]:
        """With our checkpoints, where nobody has chosen others."""
        plugins = [*given] if isinstance(given, list) else [given] if given else []
        ours = self._checkpoint_io()
        for plugin in plugins:
            if isinstance(plugin, _WrappingCheckpointIO):
                plugin.checkpoint_io = ours  # has no effect on one that wraps something
        if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            return plugins
        return [*plugins, BackgroundCheckpointIO(ours) if self._get(self.config, "async_checkpoints") else ours]

    @staticmethod
    def _default_run_dir(config: Any) -> str:
        if (is_started_by_rank_zero() or Restart.this()) and RUN_DIR in os.environ:
            return os.environ[RUN_DIR]
        strategy = config["strategy"]
        name = strategy if isinstance(strategy, str) else strategy_flag(strategy)
        return f"runs/{name}-{datetime.now():%Y-%m-%d_%H-%M-%S}"

    def _observers(self, config: Any) -> list[pl.Callback]:
        if config.get("barebones") or config.get("fast_dev_run"):
            return []
        progress = config.get("enable_progress_bar") is not False
        every = self._get(self.config, "progress_every_n_steps")
        return [CommunicationMonitor(), *(default_progress_callbacks(every) if progress else [])]

    def _writers(self, config: Any, run_dir: Path) -> list[pl.Callback]:
        if config.get("barebones") or config.get("fast_dev_run"):
            return []
        results = self._get(self.config, "results")
        path = Path(results) if results else None
        variant = self._get(self.config, "variant")
        writer = ResultsWriter(path.parent if path else run_dir, path.name if path else None, variant)
        self._dump_config()
        writer.config = self.config_dump
        callbacks: list[pl.Callback] = [writer, Dashboard(), StartBanner(), RunSummary(), StopOnSignal()]
        callbacks += [NonfiniteGuard(self._get(self.config, "on_nonfinite")), RandomState()]
        if steps := self._get(self.config, "trace_steps"):
            callbacks.append(TraceWriter(steps, run_dir))
        given = any(isinstance(callback, ModelCheckpoint) for callback in config.get("callbacks") or [])
        if config.get("enable_checkpointing") is not False and not given:
            callbacks.append(_newest_checkpoints(run_dir / "checkpoints"))
        callbacks.append(self._snapshots(config, run_dir))  # behind the guard, which lets nothing bad through
        return callbacks

    def _snapshots(self, config: Any, run_dir: Path) -> Snapshots:
        every, at_most = (self._get(self.config, name) for name in ("snapshot_every_n_steps", "max_restarts"))
        if at_most and not is_supervised():
            raise UserError("--max_restarts is for runs that gradsync starts: give it to torchrun, as --max-restarts")
        if at_most and config["num_nodes"] > 1:
            raise UserError("--max_restarts starts runs of one host again: leave it out with --trainer.num_nodes > 1")
        return Snapshots(run_dir, every, at_most)

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
            if code and process not in getattr(launcher, "given_up", ()):
                raise UserError(f"process {process.pid} of this run ended with code {code} after training")


def _check_writable(folder: Path) -> None:
    """Now, and not when the first checkpoint is due. Raises: UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # space may come before it is needed; a checkpoint that does not fit costs a warning
        raise UserError(
            f"the run's folder {folder} cannot be written ({error.strerror}): name another --run_dir"
        ) from error


def _newest_since(begun: float, trainer: pl.Trainer) -> Path | None:
    """The newest checkpoint of this run, which began then; None before there is one."""
    paths = [Path(os.environ[RUN_DIR], SNAPSHOT)]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            paths += map(Path, callback._find_last_checkpoints(trainer))
    saved = {path: path.stat().st_mtime for path in paths if path.is_file()}
    return max((path for path in saved if saved[path] >= begun), key=saved.__getitem__, default=None)


def _newest_checkpoints(folder: Path) -> ModelCheckpoint:
    """``last.ckpt`` and the newest two, so that there is one to fall back to."""
    # At the end of the training epoch: Lightning does not save the epoch's training metrics later.
    return ModelCheckpoint(
        folder, monitor="step", mode="max", save_top_k=2, save_last=True, save_on_train_epoch_end=True
    )


def _devices(devices: Any) -> Any:
    """``--trainer.devices``, or under torchrun what it has started if that is not given.

    Raises:
        UserError: torchrun has started another number of processes than the flag says.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is None or devices == started:
        return devices
    if devices == "auto":
        return int(started)
    if str(devices) != started:
        raise UserError(
            f"torchrun started {started} processes here, but --trainer.devices says {devices}: leave the flag out, "
            "or make both count all processes of the host, the parameter server's included"
        )
    return devices
