"""Executes the runs of a comparison one after another, shows how far they are, keeps what each leaves."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from rich.console import Console
from rich.live import Live

from .comparison_table import ComparisonTable
from .fit_process import error_in, running_fit
from .report import atomic_write_json, failed_filename, result_filename
from .report.methods import Method, StemParts, join_stem

_DONE = re.compile(r"^epoch \d+/\d+ done")
_SHOWN = re.compile(r"^(epoch |server( \d+)?: )")


@final
@dataclass(frozen=True)
class Run:
    """One ``gradsync fit`` of a comparison."""

    method: Method
    num_trainers: int | None
    """Only where several counts are swept."""
    repeat: int
    epochs: int
    arguments: list[str]

    @property
    def name(self) -> str:
        """For people and TensorBoard: strategy, variant, count, repeat."""
        count = f"_w{self.num_trainers}" if self.num_trainers is not None else ""
        return f"{self.method.run_name}{count}{f'_r{self.repeat}' if self.repeat > 1 else ''}"

    @property
    def stem(self) -> str:
        """For the files it leaves."""
        return join_stem(StemParts(self.method.stem, self.num_trainers, self.repeat))


@final
class ComparisonRuns:
    """Runs in order. A failed one leaves ``failed_*.json`` and its log; the others go on."""

    def __init__(self, runs: list[Run], output: Path, console: Console) -> None:
        self._runs = runs
        self._output = output
        self._console = console
        self._table = ComparisonTable((run.name, run.epochs) for run in runs)
        (output / "logs").mkdir(exist_ok=True)

    def execute(self) -> list[Run]:
        """Block until all have ended; return those that failed. Ctrl-C ends the one under way and raises."""
        if not self._console.is_terminal:
            return self._execute_all()
        with Live(self._table, console=self._console, refresh_per_second=4):
            return self._execute_all()

    def _execute_all(self) -> list[Run]:
        failed = []
        for number, run in enumerate(self._runs):
            self._table.start(number)
            error = self._execute(number, run)
            self._table.end(number, failed=error is not None)
            if error is not None:
                self._say(f"[{run.name}] FAILED: {error}")
                failed.append(run)
        return failed

    def _execute(self, number: int, run: Run) -> str | None:
        """Run one fit; None or its error in one line."""
        log_path = self._output / "logs" / f"{run.stem}.log"
        results = self._output / result_filename(run.stem)
        paths = ["--run_dir", str(self._output / "tensorboard" / run.name), "--results", str(results)]
        arguments = [*run.arguments, *paths]
        (self._output / failed_filename(run.stem)).unlink(missing_ok=True)
        self._tell(f"[{run.name}] starting, log in {log_path}")
        with log_path.open("w", buffering=1) as log:
            log.write(f"$ gradsync {' '.join(arguments)}\n")
            with running_fit(arguments, subprocess.PIPE) as process:
                assert process.stdout is not None
                last_lines = self._follow(number, run, process.stdout, log)
                code = process.wait()
        if code == 0:
            return None
        error = error_in(last_lines) or f"exit code {code}"
        failure = {
            "strategy": run.method.strategy,
            "method": run.method.name,
            "exit_code": code,
            "error": error,
            "log": str(log_path.relative_to(self._output)),
        }
        atomic_write_json(self._output / failed_filename(run.stem), failure)
        return error

    def _follow(self, number: int, run: Run, output: IO[str], log: IO[str]) -> list[str]:
        """Copy output to the log, show what matters; return the last lines."""
        last: list[str] = []
        for line in output:
            log.write(line)
            last = [*last[-199:], line.rstrip()]
            self._table.read(number, line)
            if _SHOWN.match(line):
                self._tell(f"[{run.name}] {line.rstrip()}")
            if _DONE.match(line):
                parts = (f"{self._table.part_done:.0%} of the comparison", self._table.left())
                self._tell(", ".join(part for part in parts if part))
        return last

    def _tell(self, line: str) -> None:
        """Where there is no table."""
        if not self._console.is_terminal:
            self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
