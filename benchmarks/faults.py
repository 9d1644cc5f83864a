"""What happens when something fails: `gradsync fit` against a script of plain Lightning DDP, by real faults.

    python benchmarks/faults.py --rows R1,R8 --trials 2
    python benchmarks/faults.py --json faults.json --markdown docs/faults.md

Every trial starts real processes (two ranks on the CPU, a small network), does to them what its row says, and watches:
seconds from the fault until the last process is out, the exit code, what the output says, what is left behind:
processes, ports, shared memory, temporary files. A run that does not end is ended after a minute and counts as hung.
Rows of several cases (rank 0 and rank 1) go through all of them in every trial; R8 takes the next one in each.

Bounds in seconds are those of a quiet machine: three times as long is allowed on a busy one (`busy.py`). The load is
in the JSON file. The exit code is 1 if gradsync misses what should be. Logs of trials that missed are kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import harness

if TYPE_CHECKING:
    from fault_findings import Bench, Findings, Row

ROW_NAMES = tuple(f"R{number}" for number in (1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18))
COLUMN_NAMES = ("ours", "server", "ddp")
_TRIALS = {"R8": 3, "R9": 5}
_LONG_TRIALS = {"R8": 100, "R9": 200, "R18": 20}
_MARKS = ("<!-- faults table: benchmarks/faults.py writes it -->", "<!-- end of faults table -->")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number, names = harness.positive_int, harness.names_out_of
    add = parser.add_argument
    add("--rows", type=names(ROW_NAMES), default=list(ROW_NAMES), help=f"some of {','.join(ROW_NAMES)} (all)")
    add(
        "--columns",
        type=names(COLUMN_NAMES),
        default=list(COLUMN_NAMES),
        help=f"some of {','.join(COLUMN_NAMES)} (all)",
    )
    add("--strategy", default="manual_allreduce", help="of the column ours (%(default)s)")
    add("--trials", type=number, help="of every row (1; R8: 3, R9: 5)")
    add("--long", action="store_true", help="R8: 100 trials, R9: 200, R18: 20")
    add("--logs", type=Path, metavar="DIR", help="where logs of trials that miss something go (a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    add("--markdown", type=Path, metavar="PAGE", help="put the table between this page's two marks")
    return parser.parse_args()


def num_trials(row: str, arguments: argparse.Namespace) -> int:
    if arguments.trials:
        return arguments.trials
    return _LONG_TRIALS.get(row, 1) if arguments.long else _TRIALS.get(row, 1)


@final
@dataclass
class Cell:
    """A row under one column."""

    trials: list[Findings] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    """For the JSON file, one per trial."""

    def text(self) -> str:
        from fault_findings import cell

        reasons = dict.fromkeys(record["not_run"] for record in self.records if "not_run" in record)
        return "; ".join([*filter(None, [cell(self.trials)]), *(f"not run: {reason}" for reason in reasons)])


@final
class Table:
    """Makes the trials, prints a line for each, and keeps what they found."""

    def __init__(self, arguments: argparse.Namespace, benches: dict[str, Bench], rows: dict[str, Row]) -> None:
        self._benches = benches
        self._logs = arguments.logs
        self._plan = [
            (name, column, rows[name], case)
            for name in arguments.rows
            for trial in range(num_trials(name, arguments))
            for case in rows[name].cases_of(trial)
            for column in benches
        ]
        self.cells = {(row, column): Cell() for row in arguments.rows for column in benches}
        self.failed: dict[str, str] = {}
        """Trials that missed what should be, of gradsync's columns; and those that have no result."""

    def run(self) -> None:
        started = time.monotonic()
        for done, (name, column, row, case) in enumerate(self._plan, 1):
            text = self._trial(name, column, row, case)
            left_s = (time.monotonic() - started) / done * (len(self._plan) - done)
            print(f"{done}/{len(self._plan)} {name} {column} {case}: {text} | {left_s:.0f} s left", flush=True)

    def _trial(self, name: str, column: str, row: Row, case: str) -> str:
        from fault_findings import NotRun, cell
        from fault_process import TrialFailed

        bench, kept = self._benches[column], self.cells[name, column]
        record: dict[str, Any] = {"case": case, "load_average": os.getloadavg()[0]}
        kept.records.append(record)
        try:
            found = row.trial(bench, case)
        except NotRun as reason:
            record["not_run"] = str(reason)
            return f"not run: {reason}"
        except TrialFailed as error:
            record["failed"] = str(error)
            return self._keep_log(f"{name} {column} {case}", str(error), bench, True)
        record |= {"facts": found.facts, "misses": found.misses}
        kept.trials.append(found)
        if not found.misses:
            return cell([found])
        where = self._keep_log(f"{name} {column} {case}", "; ".join(found.misses), bench, bench.column.is_ours)
        return f"{cell([found])} | {where}"

    def _keep_log(self, trial: str, why: str, bench: Bench, counts: bool) -> str:
        self._logs = self._logs or Path(tempfile.mkdtemp(prefix="fault-logs-"))
        self._logs.mkdir(parents=True, exist_ok=True)
        number = len(list(self._logs.iterdir()))
        target = self._logs / f"{number}-{trial.strip().replace(' ', '-')}.log"
        if bench.log.is_file():
            shutil.copy(bench.log, target)
        if counts:
            self.failed[f"{number} {trial}"] = f"{why} ({target})"
        return f"MISSED {why} ({target})"

    def markdown(self, rows: dict[str, Row], about: str) -> str:
        titles = [bench.column.title for bench in self._benches.values()]
        lines = [f"| | fault | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
        for name in dict.fromkeys(row for row, _ in self.cells):
            texts = [self.cells[name, column].text() or "no result" for column in self._benches]
            lines.append(f"| {name} | {rows[name].title} | {' | '.join(texts)} |")
        return "\n".join([*lines, "", about])

    def rows(self) -> dict[str, Any]:
        """For the JSON file."""
        found: dict[str, Any] = {}
        for (row, column), kept in self.cells.items():
            found.setdefault(row, {})[column] = {"text": kept.text(), "trials": kept.records}
        return found


@contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """For the trials, and for their temporary files: on another file system, where there is one in memory."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="faults-", dir=memory, ignore_cleanup_errors=True) as temporary,
    ):
        yield Path(folder), Path(temporary)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)  # so that no trial outlives this
    print("Loading torch ...", flush=True)
    from fault_checkpoint_trials import CHECKPOINT_ROWS
    from fault_columns import Ours, PlainDdp
    from fault_data_trials import DATA_ROWS
    from fault_findings import Bench
    from fault_trials import PROCESS_ROWS

    from gradsync.callbacks import machine_environment

    rows = {name: (PROCESS_ROWS | CHECKPOINT_ROWS | DATA_ROWS)[name] for name in ROW_NAMES}
    columns = {"ours": Ours(arguments.strategy), "server": Ours("parameter_server"), "ddp": PlainDdp()}
    environment = {**machine_environment(), "load_average_before": os.getloadavg()[0]}
    with folders() as (folder, temporary):
        benches = {name: Bench(columns[name], folder, temporary) for name in arguments.columns}
        table = Table(arguments, benches, rows)
        table.run()
    about = (
        f"2 ranks on one host with {environment['cpu_count']} cores, torch {environment['torch']}, Lightning "
        f"{environment['lightning']}; the load before was {environment['load_average_before']:.1f}. Figures are "
        "medians (and ranges) over trials; seconds count from the fault."
    )
    text = table.markdown(rows, about)
    print(f"\n{text}\n")
    if arguments.markdown:
        harness.put_into(arguments.markdown, _MARKS, text)
    return harness.conclude("faults", arguments, environment, table.rows(), table.failed)


if __name__ == "__main__":
    harness.run(main)
