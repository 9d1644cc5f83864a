"""The schema of result files: what is written keeps to it, and it notices what breaks it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from lightning.pytorch.callbacks import ModelCheckpoint
from result_files import ORIGINAL_KEYS, make_result, original_only, write_comparison
from tiny_fit import TinyClassifier, TinyData, make_trainer

from gradsync.callbacks import CommunicationMonitor, ResultsWriter
from gradsync.report import RESULT_SCHEMA, load_results

SCHEMA = json.loads(RESULT_SCHEMA.read_text())
VALIDATOR = Draft202012Validator(SCHEMA)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


def problems(result: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(result)]


def read(path: Path) -> Any:
    """JSON proper: the reader of Python would let NaN pass."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property with its name."""
    for key, value in schema.get("properties", {}).items():
        yield key, value
        yield from schemas(value)
    for definition in schema.get("$defs", {}).values():
        yield from schemas(definition)


def test_the_schema_is_one_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    for key, schema in schemas(SCHEMA):
        described = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        assert described.get("description"), key


def test_times_and_shares_name_their_unit() -> None:
    units = ("second", "percent", "images per second", "milliseconds")
    endings = ("_ms", "train_time", "_throughput", "_accuracy", "_pull", "_push", "_pct", "_comm_time", "_batch_time")
    measured = [(key, schema) for key, schema in schemas(SCHEMA) if key.endswith(endings)]
    assert len(measured) > 20
    for key, schema in measured:
        assert any(unit in schema["description"] for unit in units), key


def test_the_original_keys_are_required() -> None:
    assert set(SCHEMA["required"]) == set(ORIGINAL_KEYS) - {"num_workers"}


@pytest.mark.parametrize("strategy", ["ddp", "manual_allreduce", "parameter_server", "anything"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_made_up_files_keep_to_it(strategy: str, repeat: int) -> None:
    result = make_result(strategy, repeat=repeat)
    assert problems(result) == []
    assert problems(original_only(result)) == []


def test_every_file_of_a_comparison_keeps_to_it(tmp_path: Path) -> None:
    for path in write_comparison(tmp_path, repeats=2, counts=(1, 2)).glob("results_*.json"):
        assert problems(read(path)) == []


@pytest.mark.parametrize("key", [key for key in ORIGINAL_KEYS if key != "num_workers"])
def test_a_missing_key_is_noticed(key: str) -> None:
    result = make_result()
    del result[key]
    assert any(f"'{key}' is a required property" in problem for problem in problems(result))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("world_size",), 0),
        (("world_size",), 2.5),
        (("start_time",), "yesterday"),
        (("complete",), "yes"),
        (("all_losses", 0), "nan"),
        (("epochs", 0, "epoch"), 0),
        (("epochs", 0, "train_accuracy"), 101),
        (("epochs", 0, "train_time"), -1),
        (("epochs", 0, "comm", "exposed_ms"), "1 ms"),
        (("epochs", 0, "comm", "ranks"), {"exposed_ms": [1.0]}),
        (("summary", "avg_train_throughput"), "fast"),
        (("environment", "seed"), "42"),
        (("schema_version",), 2),
    ],
)
def test_a_wrong_value_is_noticed(path: tuple[Any, ...], wrong: Any) -> None:
    result = json.loads(json.dumps(make_result()))  # in which no two epochs share an object
    target: Any = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = wrong
    assert len(problems(result)) == 1


def test_further_keys_may_follow() -> None:
    result = make_result()
    result |= {"new": 1}
    result["epochs"][0] |= {"new": [1]}
    result["comm"] |= {"new": "x"}
    assert problems(result) == []


def fit(folder: Path, module: TinyClassifier | None = None, ckpt_path: str | None = None, **options: Any) -> Path:
    writer = ResultsWriter(folder)
    more = options.pop("more", [])
    trainer = make_trainer(folder, [CommunicationMonitor(warmup_steps=3), writer, *more], **options)
    trainer.fit(module or TinyClassifier(), datamodule=TinyData(), ckpt_path=ckpt_path)
    assert writer.path is not None
    return writer.path


class Diverges(TinyClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 2 else 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"module": Diverges()},
        {"limit_val_batches": 0},
        {"max_epochs": 1, "limit_train_batches": 1},
        {"accumulate_grad_batches": 3},
    ],
    ids=["plain", "loss that is no number", "no validation", "one step", "accumulation"],
)
def test_written_files_keep_to_it(tmp_path: Path, options: dict[str, Any]) -> None:
    path = fit(tmp_path, **options)
    assert problems(read(path)) == []
    assert [result.method for result in load_results(tmp_path).results] == [read(path)["method"]]


@pytest.mark.parametrize("step", [6, 8, 11])
def test_a_resumed_run_keeps_to_it(tmp_path: Path, step: int) -> None:
    """From the middle of an epoch, and from its last step."""
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path / "first", max_epochs=2, more=[saver], enable_checkpointing=True)
    again = fit(tmp_path / "second", max_epochs=2, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"))
    assert problems(read(again)) == []
