from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_fit import TinyClassifier, TinyData, make_trainer

from gradsync.callbacks import (
    CommunicationMonitor,
    LineProgress,
    StartBanner,
    StepBreakdown,
    ThroughputProgressBar,
    default_progress_callbacks,
)
from gradsync.callbacks.line_progress import format_step
from gradsync.callbacks.start_banner import banner

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True"),
]

STEP = StepBreakdown(step_ms=78.4, data_ms=4.2, compute_ms=50.6, exposed_ms=20.1, optimizer_ms=3.0, other_ms=0.5)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]


def test_a_step_line_reads_as_a_sum() -> None:
    assert format_step(STEP) == "step 78 ms = data 4 + compute 51 + exposed comm 20 + optimizer 3"


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.3, 100.0])
@pytest.mark.parametrize("other_ms", [0.0, 0.99, 1.0, 30.0])
def test_the_parts_shown_add_up_to_the_step_shown(scale: float, other_ms: float) -> None:
    step = StepBreakdown(
        *(value * scale for value in (78.4, 4.2, 50.6, 20.1, 3.0)),
        other_ms=other_ms,
    )
    total, *parts = numbers(format_step(step))
    assert total == pytest.approx(sum(parts))
    assert ("other" in format_step(step)) == (other_ms >= 1.0)


def fit(folder: Path | str, progress: Any, *, monitored: bool = True, **options: Any) -> list[float]:
    """Returns the loss of every micro-batch."""
    callbacks = [CommunicationMonitor(), progress] if monitored else [progress]
    trainer = make_trainer(folder, callbacks, enable_progress_bar=True, **options)
    module = TinyClassifier()
    trainer.fit(module, datamodule=TinyData())
    return module.losses


def test_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, LineProgress(every_n_steps=3))
    lines = capsys.readouterr().out.splitlines()
    pattern = (
        r"epoch \d step \d/8 loss \d\.\d+ \| \d+ img/s \| "
        r"step [\d.]+ ms = data [\d.]+ \+ compute [\d.]+ \+ exposed comm 0\.?0? \+ optimizer [\d.]+( \+ other [\d.]+)?"
    )
    steps = [line for line in lines if re.fullmatch(pattern, line)]
    assert [numbers(line)[:2] for line in steps] == [[1, 3], [1, 6], [2, 3], [2, 6]]
    first, second = (line for line in lines if "done" in line)
    assert len(lines) == 6
    assert re.match(r"epoch 1/2 done \| train loss \S+, top-1 \S+ % \| val loss \S+, top-1 \S+ % \| \d+ img/s", first)
    assert re.search(r"s, about [\d.]+ s left$", first)
    assert "left" not in second


def test_lines_count_optimizer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = fit(tmp_path, LineProgress(every_n_steps=1), accumulate_grad_batches=3, max_epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert [line.split(" loss")[0] for line in lines] == [f"epoch 1 step {i}/3" for i in (1, 2, 3)]
    assert [float(re.findall(r"loss (\S+)", line)[0]) for line in lines] == pytest.approx(
        losses[2::3] + losses[-1:], rel=1e-3
    )


def test_lines_without_a_monitor_and_without_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, LineProgress(), monitored=False, limit_val_batches=0, max_epochs=1)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1 step 2/8 loss \d\.\d+", first)
    assert re.fullmatch(r"epoch 1/1 done \| train loss \S+, top-1 \S+ % \| [\d.]+ s", last)


def test_the_bar_shows_images_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ThroughputProgressBar(), max_epochs=1)
    assert "img/s" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(default_progress_callbacks()[0], ThroughputProgressBar)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    (lines,) = default_progress_callbacks(every_n_steps=7)
    assert isinstance(lines, LineProgress)
    assert lines.every_n_steps == 7


def test_lines_at_no_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        LineProgress(every_n_steps=0)


def distributed_fit(rank: int, folder: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = make_trainer(
            folder,
            [StartBanner(), CommunicationMonitor(), LineProgress()],
            strategy="ddp",
            devices=2,
            max_epochs=1,
            enable_progress_bar=True,
        )
        trainer.fit(TinyClassifier(), datamodule=TinyData())
    return output.getvalue()


def test_only_rank_zero_prints(tmp_path: Path) -> None:
    first, second = run_distributed(distributed_fit, 2, str(tmp_path))
    assert "2 training, on cpu, gloo" in first
    assert "epoch 1 step 4/4" in first
    assert second == ""


def test_the_banner_says_what_runs_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="runs", version="ddp")
    trainer = make_trainer(tmp_path, [StartBanner()], logger=logger, max_epochs=1)
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    text = capsys.readouterr().out
    for fact in (
        "single_device",
        "1 training, on cpu, no process group",
        "TinyClassifier, 58 parameters",
        TinyData.description,
        "2: below, above",
        str(tmp_path / "runs" / "ddp"),
        f"tensorboard --logdir {tmp_path} ",
        "#custom_scalars",
    ):
        assert fact in text


def test_the_banner_counts_frozen_parameters_and_shortens_long_lists(tmp_path: Path) -> None:
    class ManyClasses(TinyData):
        class_names = tuple(f"class{i}" for i in range(1000))

    module = TinyClassifier()
    module.net[0].requires_grad_(False)
    trainer = make_trainer(tmp_path, [], max_epochs=1)
    trainer.fit(module, datamodule=ManyClasses())
    text = banner(trainer, module)
    assert "58 parameters, 18 of them trained" in text
    assert "1000: class0, class1, class2, class3, class4, ..." in text
    assert str(tmp_path) in text
