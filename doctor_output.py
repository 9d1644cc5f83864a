"""What ``gradsync doctor`` shows and writes: a line for each check, a summary, the next command, a JSON file."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.text import Text

from .health import Check, PlannedRun
from .health.check import plural
from .health.planned_run import Launched
from .report import atomic_write_json

DOCTOR_SCHEMA = Path(__file__).parent / "health" / "doctor.schema.json"
_FORMAT = 1
_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
_MARK_WIDTH, _NAME_WIDTH, _LEAST_WIDTH = 6, 15, 20


@final
class Screen:
    """Shows each check as soon as it is known."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._checks: list[Check] = []

    def begin(self, run: PlannedRun, launched: Launched | None) -> None:
        place = "GPUs with NCCL" if run.accelerator == "gpu" else "the CPU with gloo"
        started = f", of {launched.world_size} that are running" if launched else ""
        self._say(f"A run of {plural(run.devices, 'rank')} on {place}{started}, on this machine:")

    def show(self, check: Check) -> None:
        self._checks.append(check)
        style = _STYLES[check.mark]
        head = [(check.mark.ljust(_MARK_WIDTH), style), (check.name.ljust(_NAME_WIDTH), "bold")]
        for line in self._wrapped(check.found):
            self._console.print(Text.assemble(*head, line), soft_wrap=True)
            head = [(" " * (_MARK_WIDTH + _NAME_WIDTH), "")]
        for line in self._wrapped(f"-> {check.remedy}") if check.remedy else []:
            self._console.print(Text.assemble(*head, (line, style)), soft_wrap=True)

    def _wrapped(self, text: str) -> list[str]:
        """As wide as there is room; paths and flags stay whole, since they are there to be copied."""
        width = max(_LEAST_WIDTH, self._console.width - _MARK_WIDTH - _NAME_WIDTH)
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def end(self, run: PlannedRun, command: list[str], json: Path | None) -> bool:
        """Summary, file, next command. Whether a check failed. Raises: OSError, for the file."""
        counts = {mark: sum(check.mark == mark for check in self._checks) for mark in _STYLES}
        total = plural(len(self._checks), "check")
        self._say(f"\n{total}: {counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} FAIL")
        if json is not None:
            atomic_write_json(json, _document(run, self._checks, counts))
        if counts["FAIL"]:
            self._say(f"Change what is marked FAIL, then again: {shlex.join(command)}")
        else:
            self._say(f"Next: {_next_command(run)}")
        return counts["FAIL"] > 0

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _document(run: PlannedRun, checks: list[Check], counts: dict[str, int]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "devices": run.devices,
        "accelerator": run.accelerator,
        "backend": run.backend,
        "ok": counts["ok"],
        "warn": counts["warn"],
        "fail": counts["FAIL"],
        "checks": [asdict(check) for check in checks],
    }


def _next_command(run: PlannedRun) -> str:
    parts = ["gradsync", "fit", "--trainer.accelerator", run.accelerator, "--trainer.devices", str(run.devices)]
    if run.devices > 1:
        parts += ["--trainer.strategy", "manual_allreduce"]
    if run.data_dir is not None:
        parts += ["--data.root", run.data_dir]
    if run.output != Path("runs"):
        parts += ["--run_dir", str(run.output / "first")]
    return shlex.join(parts)
