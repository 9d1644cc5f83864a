"""What every benchmark needs: groups of processes, interleaved rounds, medians and ratios, a table and a JSON file.

Knows neither torch nor Lightning, so that a script can look at its arguments before it loads them.
A *row* is one thing that is measured; it is called once per round and returns its metrics, named with their unit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

Metrics = dict[str, float]
Summary = dict[str, dict[str, dict[str, float]]]
"""Row, metric, then ``median``, ``min`` and ``max``."""

_PR_SET_PDEATHSIG = 1
_GRACE_S = 3.0
"""How long the others may go on once one process has failed, so that each can say what it knows."""
_OUTPUT_LINES_SHOWN = 12


class RowFailed(Exception):
    """A row has no result, for the reason in the text."""


def positive_int(text: str) -> int:
    """For argparse. Raises: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def names_out_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: a list with commas in which every name is one of `known`."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(filter(None, text.split(","))))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            got = f"got {unknown[0]!r}" if unknown else "got none"
            raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}; {got}")
        return names

    return parse


# -- processes -----------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Process:
    """What a process of a group knows of the others."""

    index: int
    size: int
    earlier_pids: tuple[int, ...]
    """Of the processes with a lower index."""
    folder: Path
    """Of the group; it goes with it."""


def run_processes(function: Callable[[Process], Any], size: int, timeout_s: float) -> list[Any]:
    """Call `function` in `size` processes, see :class:`Processes`; their results (JSON values) in order.

    Raises: RowFailed, see :meth:`Processes.results`.
    """
    processes = Processes(function, size)
    try:
        return processes.results(timeout_s)
    finally:
        processes.end()


@final
class Processes:
    """`size` processes forked from this one, each calling `function`. None of them outlives this one.

    This process should have loaded all that they need, and run no threads. They find themselves in an environment
    as torchrun would make it.
    """

    def __init__(self, function: Callable[[Process], Any], size: int) -> None:
        from gradsync.processes import make_private_folder  # here: arguments are checked before torch is loaded

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pids: list[int] = []
        self._failed: dict[int, int] = {}
        sys.stdout.flush()
        self._folder = make_private_folder("benchmark")  # also removes what a killed run left
        for index in range(size):
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                _be_process(function, Process(index, size, tuple(self._pids), self._folder), port, parent)
            self._pids.append(pid)
        self._running = dict(enumerate(self._pids))

    def one_has_failed(self) -> bool:
        """Blocks for nobody."""
        for index, pid in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._running[index]
                if status != 0:
                    self._failed[index] = os.waitstatus_to_exitcode(status)
        return bool(self._failed)

    def results(self, timeout_s: float) -> list[Any]:
        """What `function` returned in each process (JSON values); blocks until all have ended.

        Raises: RowFailed with the output of whoever failed first, or if not all have ended after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while self._running and time.monotonic() < deadline:
            had_failed = bool(self._failed)
            if self.one_has_failed() and not had_failed:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.01)
        for index, exit_code in self._failed.items():
            lines = (self._folder / f"output_{index}").read_text(errors="replace").splitlines()
            shown = "".join(f"\n    {line}" for line in lines[-_OUTPUT_LINES_SHOWN:])
            raise RowFailed(f"process {index} of {len(self._pids)} ended with exit code {exit_code}{shown}")
        if self._running:
            raise RowFailed(f"process(es) {', '.join(map(str, self._running))} did not end within {timeout_s:g} s")
        return [json.loads((self._folder / f"result_{index}").read_text()) for index in range(len(self._pids))]

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP halts all threads of all processes, SIGCONT lets them go on."""
        for pid in self._running.values():
            os.killpg(pid, number)

    def end(self) -> None:
        """Kill whoever is left."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # if it had no time yet to make its group
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self._folder, ignore_errors=True)


def _be_process(function: Callable[[Process], Any], process: Process, port: int, parent: int) -> None:
    """The whole life of a forked process: it never returns."""
    code, folder = 1, process.folder
    try:
        # a group of its own: Ctrl-C reaches the parent only, which then ends all
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(code)
        output = os.open(folder / f"output_{process.index}", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 (until the process ends)
        rank, size = str(process.index), str(process.size)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": size}
        (folder / f"result_{process.index}").write_text(json.dumps(function(process)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter's own end takes seconds with torch loaded


def cpu_s(pid: int) -> float:
    """Processor time that process `pid` has used so far, all its threads, in seconds (steps of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@final
class StolenTime:
    """Share of this machine's processor time that its host gave to others (steal) since this object was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def pct(self) -> float:
        stolen, total = (after - before for before, after in zip(self._before, self._now(), strict=True))
        return 100 * stolen / max(1, total)

    @staticmethod
    def _now() -> tuple[int, int]:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[7], sum(ticks)


# -- rounds --------------------------------------------------------------------------------------------------


@final
class Rounds:
    """Measures rows in turn, round after round, so that a busy minute of the machine hits all of them.

    Every second round goes backwards. A row that fails is left out from then on, the others go on.

    Args:
        rows: Name and what measures it once; that may raise :class:`RowFailed`.
        shown: The metric in the progress lines.
    """

    def __init__(self, rows: Mapping[str, Callable[[], Metrics]], shown: str) -> None:
        self._rows = dict(rows)
        self._shown = shown
        self.failed: dict[str, str] = {}
        """Why a row has no result."""
        self._samples: dict[str, list[Metrics]] = {name: [] for name in rows}

    def run(self, num_rounds: int) -> None:
        """Prints a line per measurement, with the time left."""
        started, done = time.monotonic(), 0
        for number in range(num_rounds):
            names = list(self._rows)
            for name in names if number % 2 == 0 else reversed(names):
                text = self._measure(name)
                done += 1
                to_come = num_rounds * len(names) - done
                left_s = (time.monotonic() - started) / done * max(0, to_come)
                print(f"round {number + 1}/{num_rounds} {name}: {text} | {left_s:.0f} s left", flush=True)
            self._rows = {name: row for name, row in self._rows.items() if name not in self.failed}

    def _measure(self, name: str) -> str:
        try:
            metrics = self._rows[name]()
        except RowFailed as error:
            self.failed[name] = str(error)
            return f"FAILED: {self.failed[name].splitlines()[0]}"
        self._samples[name].append(metrics)
        return f"{metrics[self._shown]:.1f} {self._shown}"

    def summary(self, baselines: Sequence[str] = (), metric: str = "") -> Summary:
        """Median, min and max over rounds of every metric, and of its ratio to that of `baselines`.

        A ratio, ``ratio_to_BASELINE``, is taken within a round: what slows the machine for a while cancels out.
        """
        samples = {name: rounds for name, rounds in self._samples.items() if name not in self.failed and rounds}
        with_ratios = {
            name: [
                sample
                | {
                    f"ratio_to_{base}": sample[metric] / samples[base][i][metric]
                    for base in baselines
                    if base in samples
                }
                for i, sample in enumerate(rounds)
            ]
            for name, rounds in samples.items()
        }
        return {name: _spread(rounds) for name, rounds in with_ratios.items()}

    def differences(self, name: str, base: str, metric: Callable[[Metrics], float]) -> dict[str, float]:
        """Median, min and max over rounds of what `metric` of row `name` is above that of `base` in the same round."""
        pairs = zip(self._samples[name], self._samples[base], strict=True)
        values = [metric(sample) - metric(other) for sample, other in pairs]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def summary_with_ratios(self, baseline: str, metrics: Mapping[str, str]) -> Summary:
        """As :meth:`summary`, with ``NAME_ratio_to_BASELINE`` for every name and metric in `metrics`."""
        summary = self.summary()
        for name, metric in metrics.items():
            for row, values in self.summary((baseline,), metric).items():
                if f"ratio_to_{baseline}" in values:
                    summary[row][f"{name}_ratio_to_{baseline}"] = values[f"ratio_to_{baseline}"]
        return summary


def _spread(rounds: list[Metrics]) -> dict[str, dict[str, float]]:
    values = {metric: [sample[metric] for sample in rounds] for metric in rounds[0]}
    return {m: {"median": statistics.median(v), "min": min(v), "max": max(v)} for m, v in values.items()}


# -- results -------------------------------------------------------------------------------------------------


def allocator() -> str:
    """Which memory allocator every row runs with, and what the environment tells it."""
    variables = [k for k in os.environ if k.startswith("MALLOC_") or k in ("LD_PRELOAD", "GLIBC_TUNABLES")]
    return " ".join(["glibc"] + [f"{k}={os.environ[k]}" for k in sorted(variables)]) if variables else "glibc default"


def load_line(environment: Mapping[str, Any]) -> str:
    """How busy the machine was with other things."""
    return (
        f"The machine's load in the minute before was {environment['load_average_before']:.1f}; meanwhile its host "
        f"gave {environment['stolen_pct']:.1f} % of its processor time to others."
    )


def put_into(page: Path, marks: tuple[str, str], table: str) -> None:
    """Replace what stands between the two marks on `page`. Raises: ValueError if it has none."""
    before, begin, rest = page.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {marks[0]} and {marks[1]}")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def conclude(
    benchmark: str,
    arguments: argparse.Namespace,
    environment: Mapping[str, Any],
    rows: Mapping[str, Any],
    failed: Mapping[str, str],
    **settings: Any,
) -> int:
    """Print what failed, write ``--json`` if asked for; the exit code."""
    from gradsync.report import atomic_write_json  # here: arguments are checked before torch is loaded

    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}", file=sys.stderr)
    if arguments.json:
        given = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        given |= {"allocator": allocator(), "failed": failed, **settings}
        result = {"benchmark": benchmark, "settings": given, "environment": environment, "rows": rows}
        atomic_write_json(arguments.json, result)
        print(f"Written: {arguments.json}")
    return 1 if failed else 0


def run(main: Callable[[], int]) -> None:
    """A script's last line: Ctrl-C ends it in one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def print_table(rows: Summary) -> None:
    """Medians with (min - max); one line per row, one column per metric."""
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    metrics.sort(key=lambda metric: "ratio_to_" in metric)
    cells = [["row", *metrics]]
    cells += [[name, *(_cell(metric, values.get(metric)) for metric in metrics)] for name, values in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(metric: str, spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    digits = 3 if "ratio_to_" in metric else 1
    return "{median:.{d}f} ({min:.{d}f} - {max:.{d}f})".format(**spread, d=digits)
