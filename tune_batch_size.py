"""``gradsync tune-batch-size``: which batch size trains the most images per second in the memory there is."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from datetime import datetime
from pathlib import Path
from typing import final

from rich.console import Console
from rich.table import Table

from .argument_types import positive_float, positive_int
from .batch_size_search import BatchSizeSearch
from .batch_size_trial import GIB, Trial, run_trial
from .errors import UserError
from .report import atomic_write_json
from .report.batch_size_plot import write_batch_size_plot

RESULT_FILENAME = "batch_sizes.json"
_SHARE_OF_FREE_MEMORY = 0.9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync tune-batch-size",
        description="Train a few steps with batch sizes that double while they fit, then bisect; show images/s and "
        "memory of each, and name the best. Everything after -- goes to every `gradsync fit`: strategy, model, data.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--first", type=positive_int, default=8, metavar="N", help="batch size to begin with (default 8)")
    add("--most", type=positive_int, default=1024, metavar="N", help="largest batch size to try (default 1024)")
    add("--steps", type=positive_int, default=15, metavar="N", help="steps of each trial (default 15)")
    add(
        "--memory-limit-gib",
        type=positive_float("GiB"),
        metavar="X",
        help="memory of all processes together (default: 90 %% of what is free now)",
    )
    add("--output", type=Path, metavar="DIR", help="folder of table, plot and logs (default: tuning/TIME)")
    return parser


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a trial failed for something else than memory, or none fits.
    """
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = _parser().parse_args(arguments[:at]), arguments[at + 1 :]
    if options.first > options.most:
        raise UserError(f"--first {options.first} must not be more than --most {options.most}")
    if any(part.split("=")[0] == "--data.batch_size" for part in extra):
        raise UserError("--data.batch_size is what this command looks for: leave it out, or give --first and --most")
    output = options.output or Path("tuning") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    limit = options.memory_limit_gib * GIB if options.memory_limit_gib else _SHARE_OF_FREE_MEMORY * free_bytes()
    tuning = Tuning(extra, options.steps, output, limit, Console(highlight=False))
    tuning.run(BatchSizeSearch(options.first, options.most))
    tuning.conclude()


def free_bytes() -> int:
    """Memory that this process and its children may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or without a limit
        return free


@final
class Tuning:
    """The trials of one command, kept in a file after each."""

    def __init__(self, extra: list[str], steps: int, output: Path, limit_bytes: float, console: Console) -> None:
        self._extra = extra
        self._output = output
        self._limit = limit_bytes
        self._console = console
        self._arguments = [
            *extra,
            *("--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "0"),
            *("--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false"),
        ]
        self.trials: list[Trial] = []
        try:
            (output / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
        if (output / RESULT_FILENAME).exists():
            raise UserError(f"--output {output} holds results already: name another folder, they would be lost")

    def run(self, search: BatchSizeSearch) -> None:
        """All trials; Ctrl-C ends the one under way and raises."""
        self._say(
            f"Memory limit {self._limit / GIB:.1f} GiB for all processes together; logs in {self._output / 'trials'}"
        )
        while (size := search.next()) is not None:
            trial = self._try(size, search.trials_left())
            if trial.outcome == "failed":
                raise UserError(f"{trial.detail}\n(batch size {size}; log: {self._output / 'trials' / f'{size}.log'})")
            if trial.largest is not None:
                search.limit(trial.largest)
            else:
                search.tell(size, trial.outcome == "fits")

    def _try(self, size: int, trials_left: int) -> Trial:
        usual = sum(trial.seconds for trial in self.trials) / len(self.trials) if self.trials else 0.0
        left = f", at most {usual * trials_left:.0f} s left" if usual else ""
        text = f"batch size {size}: training ({trials_left} trials at most{left})"
        if self._console.is_terminal:
            with self._console.status(text):
                trial = run_trial(size, self._arguments, self._output / "trials", self._limit)
        else:
            self._say(text)
            trial = run_trial(size, self._arguments, self._output / "trials", self._limit)
        self.trials.append(trial)
        self._say(f"batch size {size}: {_told(trial)}")
        self._write()
        return trial

    @property
    def best(self) -> Trial | None:
        """Most images per second; the smaller of equals."""
        fitting = [trial for trial in self.trials if trial.images_per_s is not None]
        return max(fitting, key=lambda trial: (trial.images_per_s or 0.0, -trial.batch_size), default=None)

    def _write(self) -> None:
        content = {
            "fit_arguments": self._extra,
            "memory_limit_gib": self._limit / GIB,
            "best": self.best.batch_size if self.best else None,
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }
        atomic_write_json(self._output / RESULT_FILENAME, content)

    def conclude(self) -> None:
        """Table, plot, and the next command.

        Raises:
            UserError: no size fits.
        """
        if self.best is None:
            raise UserError(
                "no batch size fits, not even 1: use a smaller model or smaller images, or raise --memory-limit-gib"
            )
        trials = sorted(self.trials, key=lambda trial: trial.batch_size)
        self._console.print(_table(trials, self.best))
        plot = write_batch_size_plot(
            [(t.batch_size, t.images_per_s, t.peak_gib) for t in trials if t.outcome != "more than the data"],
            self.best.batch_size,
            self._limit / GIB,
            self._output / "batch_size.png",
        )
        command = ["gradsync", "fit", *self._extra, "--data.batch_size", str(self.best.batch_size)]
        self._say(f"Written: {self._output / RESULT_FILENAME}, {plot}")
        self._say(f"Best: {self.best.batch_size} images per training process. Train with it:\n  {shlex.join(command)}")
        self._say(
            "A learning rate is for one global batch size: scale it in proportion, or let --model.reference_batch_size"
            " do it."
        )

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _told(trial: Trial) -> str:
    if trial.images_per_s is not None:
        return f"{trial.images_per_s:.1f} images/s, {trial.peak_gib:.2f} GiB"
    if trial.largest is not None:
        return f"more than the data allow, which is {trial.largest}"
    return f"{trial.outcome}: {trial.detail}"


def _table(trials: list[Trial], best: Trial) -> Table:
    table = Table(title="Batch size per training process")
    has_gpu = any(trial.peak_gpu_gib for trial in trials)
    for head in ("batch size", "images/s", "peak GiB", *(["peak GPU GiB"] if has_gpu else [])):
        table.add_column(head, justify="right")
    table.add_column("outcome")
    for trial in trials:
        speed = "-" if trial.images_per_s is None else f"{trial.images_per_s:.1f}"
        gpu = [f"{trial.peak_gpu_gib or 0:.2f}"] if has_gpu else []
        outcome = "best" if trial is best else trial.outcome
        style = "bold" if trial is best else None
        table.add_row(str(trial.batch_size), speed, f"{trial.peak_gib:.2f}", *gpu, outcome, style=style)
    return table
