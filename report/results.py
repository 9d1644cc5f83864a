"""Result files of a comparison folder, read so that a wrong one costs only itself.

Needed in a file: ``method``, ``world_size`` and one finished epoch. All else may be absent (files of other
programs have only the original keys) or wrong: it becomes NaN, is named in the problems, and the rest is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from .absent import describe_failure, describe_missing
from .fields import Fields, UnusableError, one_line, printable, read_json_object, shortened
from .figures import NAN, first, largest, mean, ratio
from .methods import FAILED_PATTERN, RESULT_PATTERN, StemParts, split_stem, strategy_of

RESULT_SCHEMA = Path(__file__).with_name("result.schema.json")
"""JSON Schema of these files: keys, types and units. Reading is more tolerant than it."""


@final
@dataclass(frozen=True)
class Communication:
    """An average step on rank 0, in milliseconds; NaN where the strategy or the file has no such figure."""

    step_ms: float = NAN
    data_ms: float = NAN
    compute_ms: float = NAN
    optimizer_ms: float = NAN
    other_ms: float = NAN
    total_ms: float = NAN
    exposed_ms: float = NAN
    overlapped_ms: float = NAN
    share_pct: float = NAN
    """Exposed communication in percent of the step."""
    bytes_per_step: float = NAN
    push_ms: float = NAN
    pull_ms: float = NAN
    wait_ms: float = NAN
    total_is_upper_bound: bool = False

    @property
    def has_server(self) -> bool:
        return not (math.isnan(self.push_ms) and math.isnan(self.pull_ms))


@final
@dataclass(frozen=True)
class Epoch:
    """One epoch's figures: seconds, percent, images/s over all workers; NaN where the file has none."""

    epoch: int
    train_loss: float
    train_accuracy: float
    train_time: float
    train_throughput: float
    val_loss: float
    val_accuracy: float


@final
@dataclass(frozen=True, eq=False)
class Result:
    """One run, from one file."""

    filename: str
    base: str
    repeat: int
    strategy: str
    variant: str
    """What tells it from other runs of the strategy; empty for the strategy as is."""
    method: str
    world_size: int
    training_processes: int
    batch_size: float
    global_batch_size: float
    start_time: str
    end_time: str
    epochs: tuple[Epoch, ...]
    avg_train_throughput: float
    avg_train_time_per_epoch: float
    best_val_accuracy: float
    all_losses: tuple[float, ...]
    comm: Communication
    complete: bool | None
    """None: the file does not say."""
    demo_data: bool
    data: str
    warmup_steps: float
    measured_steps: float
    """Steps that time figures are means of; 0 where only warm-up steps were there. NaN: the file does not say."""
    environment: dict[str, Any]
    config: dict[str, Any]
    num_bad_samples: float = NAN
    """Images that could not be read and were left out. NaN: the file does not say."""
    first_bad_sample: str = ""
    num_skipped_steps: int = 0
    """Optimizer steps that were left out because gradients were not finite."""
    lost_workers: tuple[str, ...] = ()
    """Those that the run went on without, and what became of them."""

    @property
    def server_processes(self) -> int:
        return max(0, self.world_size - self.training_processes)


@final
@dataclass(frozen=True)
class LoadedResults:
    """What a folder holds, and one line for each thing that is wrong with it."""

    results: list[Result]
    problems: list[str]


def load_results(folder: Path) -> LoadedResults:
    """Read all results of `folder`. Raises: OSError if the folder itself cannot be read."""
    results: list[Result] = []
    problems: list[str] = []
    files = sorted(path for path in folder.iterdir() if path.match(RESULT_PATTERN))
    for path in files:
        try:
            result, wrong = _read_result(path)
        except UnusableError as error:
            problems.append(f"{path.name} is left out: {error}")
            continue
        results.append(result)
        problems.extend(f"{path.name}: {problem}" for problem in shortened(wrong))
    failed = sorted(path for path in folder.iterdir() if path.match(FAILED_PATTERN))
    with_epochs = {result.filename for result in results}
    problems.extend(describe_failure(path, with_epochs) for path in failed)
    stems = {path.stem.removeprefix("results_") for path in files}
    problems.extend(describe_missing(folder, stems, {path.stem.removeprefix("failed_") for path in failed}))
    return LoadedResults(results, problems)


def _read_result(path: Path) -> tuple[Result, list[str]]:
    problems: list[str] = []
    fields = Fields(read_json_object(path), problems)
    stem = split_stem(path.stem.removeprefix("results_"))
    epoch_fields = fields.records("epochs", "epoch")
    world_size = fields.count("world_size")
    method = fields.text("method")
    if not method or world_size is None or not epoch_fields:
        needed = {"method": method, "world_size": world_size, "epochs": epoch_fields}
        absent = [name for name, value in needed.items() if not value]
        detail = f" ({'; '.join(shortened(problems))})" if problems else ""
        raise UnusableError(f"it has no usable {', '.join(absent)}{detail}")
    epochs = tuple(_epoch(record, index) for index, record in enumerate(epoch_fields, start=1))
    return _result(path, fields, stem, method, world_size, epochs, epoch_fields), problems


def _result(
    path: Path,
    fields: Fields,
    stem: StemParts,
    method: str,
    world_size: int,
    epochs: tuple[Epoch, ...],
    epoch_fields: Sequence[Fields],
) -> Result:
    summary = fields.record("summary")
    workers = fields.count("num_workers") or world_size
    batch_size = fields.number("batch_size", minimum=1, nullable=True)
    global_batch = fields.number("global_batch_size", minimum=1, nullable=True)
    return Result(
        filename=printable(path.name),
        base=stem.base,
        repeat=stem.repeat,
        strategy=fields.text("strategy") or strategy_of(method, stem.base),
        variant=fields.text("variant"),
        method=method,
        world_size=world_size,
        training_processes=workers,
        batch_size=batch_size,
        global_batch_size=first(global_batch, batch_size * workers),
        start_time=fields.text("start_time"),
        end_time=fields.text("end_time"),
        epochs=epochs,
        avg_train_throughput=first(
            summary.number("avg_train_throughput", minimum=0), mean(e.train_throughput for e in epochs)
        ),
        avg_train_time_per_epoch=first(
            summary.number("avg_train_time_per_epoch", minimum=0), mean(e.train_time for e in epochs)
        ),
        best_val_accuracy=first(
            summary.number("best_val_accuracy", minimum=0, nullable=True), largest(e.val_accuracy for e in epochs)
        ),
        all_losses=fields.numbers("all_losses", "step"),
        comm=_communication(fields.record("comm"), epoch_fields),
        complete=fields.flag("complete"),
        demo_data=bool(fields.flag("demo_data")),
        data=fields.text("data"),
        warmup_steps=fields.number("warmup_steps", minimum=0, nullable=True),
        measured_steps=_measured_steps(epoch_fields),
        environment=fields.mapping("environment"),
        config=fields.mapping("config"),
        num_bad_samples=fields.record("bad_samples").number("count", minimum=0),
        first_bad_sample=_first_name(fields.mapping("bad_samples").get("first")),
        num_skipped_steps=len(fields.numbers("skipped_steps", "step")),
        lost_workers=_lost_workers(fields),
    )


def _lost_workers(fields: Fields) -> tuple[str, ...]:
    records = fields.records("lost_workers", "lost worker") if "lost_workers" in fields else []
    return tuple(f"worker {record.number('worker'):g}, which {printable(record.text('reason'))}" for record in records)


def _first_name(names: object) -> str:
    return one_line(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else "not named"


def _epoch(fields: Fields, index: int) -> Epoch:
    return Epoch(
        epoch=fields.count("epoch") or index,
        train_loss=fields.number("train_loss"),
        train_accuracy=fields.number("train_accuracy", minimum=0),
        train_time=fields.number("train_time", minimum=0),
        train_throughput=fields.number("train_throughput", minimum=0),
        val_loss=fields.number("val_loss", nullable=True),
        val_accuracy=fields.number("val_accuracy", minimum=0, nullable=True),
    )


def _measured_steps(epochs: Sequence[Fields]) -> float:
    counts = [epoch.record("comm").number("measured_steps", minimum=0, nullable=True) for epoch in epochs]
    return NAN if all(map(math.isnan, counts)) else sum(count for count in counts if not math.isnan(count))


_COMM_FIGURES = tuple(name for name in Communication.__dataclass_fields__ if name != "total_is_upper_bound")


def _communication(comm: Fields, epochs: Sequence[Fields]) -> Communication:
    """The run's ``comm``, else the mean of its epochs' ``comm``, else what the original keys tell."""
    per_epoch = [epoch.record("comm") for epoch in epochs]
    figures = {
        name: first(comm.number(name, nullable=True), mean(epoch.number(name, nullable=True) for epoch in per_epoch))
        for name in _COMM_FIGURES
    }
    bounds = [part.flag("total_is_upper_bound") for part in (comm, *per_epoch)]
    original = {
        name: mean(epoch.number(key, minimum=0, nullable=True) for epoch in epochs) * 1000
        for name, key in (
            ("step_ms", "avg_batch_time"),
            ("total_ms", "avg_comm_time"),
            ("push_ms", "avg_comm_time_push"),
            ("pull_ms", "avg_comm_time_pull"),
        )
    }
    figures |= {name: first(figures[name], value) for name, value in original.items()}
    summed = math.isnan(figures["total_ms"]) and not math.isnan(figures["push_ms"] + figures["pull_ms"])
    if summed:
        # Push and pull may overlap, so their sum is only a bound on the length of their union.
        figures["total_ms"] = figures["push_ms"] + figures["pull_ms"]
    figures["share_pct"] = first(figures["share_pct"], ratio(figures["exposed_ms"], figures["step_ms"]) * 100)
    return Communication(**figures, total_is_upper_bound=summed or any(bounds))
