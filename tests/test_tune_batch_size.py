"""``gradsync tune-batch-size``: the search, and trials in real processes that fit, do not, or are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from commands import run_command
from image_trees import write_tree

from gradsync.batch_size_search import BatchSizeSearch
from gradsync.batch_size_trial import why_too_large
from gradsync.errors import UserError
from gradsync.tune_batch_size import main as tune


@pytest.mark.parametrize("first", [1, 2, 8, 100])
@pytest.mark.parametrize("most", [1, 7, 64, 1000])
@pytest.mark.parametrize("largest", [0, 1, 2, 3, 9, 31, 64, 65, 500, 999, 1000])
def test_the_search_finds_the_largest_to_an_eighth(first: int, most: int, largest: int) -> None:
    search = BatchSizeSearch(first, most)
    tried: list[int] = []
    left = search.trials_left()
    while (size := search.next()) is not None:
        tried.append(size)
        assert len(tried) < 50
        search.tell(size, size <= largest)
    assert len(tried) == len(set(tried))
    assert all(1 <= size <= most for size in tried)
    fits, expected = [size for size in tried if size <= largest], min(largest, most)
    assert (max(fits) if fits else 0) <= expected
    assert expected - (max(fits) if fits else 0) <= max(1, (max(fits) if fits else 0) // 8)
    if expected in (0, most):
        assert len(tried) <= left


def test_the_search_keeps_to_a_limit_that_a_trial_has_shown() -> None:
    search = BatchSizeSearch(8, 1024)
    search.tell(8, fits=True)
    assert search.next() == 16
    search.limit(12)
    assert search.next() == 12
    search.tell(12, fits=True)
    assert search.next() is None
    assert search.largest_that_fits == 12


CLOSED = "gradsync: error: another process of the run has gone; its own error stands above (Connection closed by peer)"


@pytest.mark.parametrize(
    ("code", "lines", "is_memory"),
    [
        (1, ["gradsync: error: out of memory: lower --data.batch_size"], True),
        (-6, ["terminate called after throwing an instance of 'std::bad_alloc'"], True),
        (-9, [], True),
        (137, [CLOSED], True),
        (1, [CLOSED], True),
        (1, ["gradsync: error: worker 1 was killed by SIGKILL"], True),
        (1, [CLOSED, "gradsync: error: --data.root: no such folder"], False),
        (1, ["gradsync: another process failed first (process 1: ValueError: wrong)"], False),
        (1, ["gradsync: another process failed first (process 1: out of memory: lower --data.batch_size)"], True),
        (2, ["error: unrecognized arguments"], False),
        (1, ["Traceback", "ValueError: wrong"], False),
    ],
)
def test_what_counts_as_too_large(code: int, lines: list[str], is_memory: bool) -> None:
    assert bool(why_too_large(code, lines)) == is_memory


class KillRank(pl.Callback):
    """As the kernel does to the largest process where memory is short: without a word."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if len(batch[1]) > 16 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return tmp_path / "tuning"


def fit(*more: object) -> list[str]:
    options = ["--model.arch", "squeezenet1_1", "--data.image_size", "32", "--data.num_workers", "0"]
    return ["--", *options, "--trainer.accelerator", "cpu", *map(str, more)]


def outcomes(folder: Path) -> dict[int, str]:
    trials = json.loads((folder / "batch_sizes.json").read_text())["trials"]
    return {trial["batch_size"]: trial["outcome"] for trial in trials}


def test_sizes_up_to_the_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", 4, 1)
    tune(["--first", "8", "--steps", "7", "--output", str(folder), *fit("--data.root", tree, "--trainer.devices", 1)])
    assert outcomes(folder) == {8: "fits", 16: "more than the data", 12: "fits"}
    content = json.loads((folder / "batch_sizes.json").read_text())
    fitting = {trial["batch_size"]: trial for trial in content["trials"] if trial["outcome"] == "fits"}
    assert content["best"] == max(fitting, key=lambda size: fitting[size]["images_per_s"])
    assert all(0.1 < trial["peak_gib"] < 10 for trial in fitting.values())
    assert (folder / "batch_size.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert f"--data.batch_size {content['best']}" in printed
    assert "more than the data allow, which is 12" in printed


def test_a_killed_trial_is_survived(folder: Path) -> None:
    options = fit("--trainer.strategy", "manual_allreduce", "--trainer.devices", 2)
    kill = ["--trainer.callbacks+", "test_tune_batch_size.KillRank"]
    tune(["--first", "16", "--most", "18", "--steps", "7", "--output", str(folder), *options, *kill])
    assert outcomes(folder) == {16: "fits", 18: "too large"}
    assert json.loads((folder / "batch_sizes.json").read_text())["best"] == 16


def test_a_limit_that_nothing_fits(folder: Path) -> None:
    options = ["--first", "2", "--memory-limit-gib", "0.2", "--output", str(folder), *fit("--trainer.devices", 1)]
    with pytest.raises(UserError, match="no batch size fits, not even 1"):
        tune(options)
    trials = json.loads((folder / "batch_sizes.json").read_text())["trials"]
    assert [(trial["batch_size"], trial["outcome"]) for trial in trials] == [(2, "too large"), (1, "too large")]
    assert all(trial["detail"] == "beyond the limit of 0.20 GiB" for trial in trials)


def test_errors(folder: Path) -> None:
    def error_of(*arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            tune(["--output", str(folder), *arguments])
        return str(caught.value)

    assert error_of(*fit("--trainer.strategy", "nosuch")).startswith("unknown --trainer.strategy 'nosuch'")
    assert list(outcomes(folder).values()) == ["failed"]
    assert "holds results already" in error_of(*fit())
    (folder / "batch_sizes.json").unlink()
    assert "--first 9 must not be more than --most 8" in error_of("--first", "9", "--most", "8")
    assert "--data.batch_size is what this command looks for" in error_of(*fit("--data.batch_size", 4))


def test_ctrl_c_leaves_no_process_and_keeps_what_is_finished(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gradsync", "tune-batch-size", "--first", "4", "--steps", "7"]
    options = ["--output", str(folder), *fit("--trainer.devices", 2, "--trainer.strategy", "ddp")]
    ended = run_command([*command, *options], tmp_path, interrupt_at="batch size 8: training")
    assert ended.code == 130, ended.output
    assert not ended.orphans
    assert outcomes(folder) == {4: "fits"}
