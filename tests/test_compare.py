"""``gradsync compare``: clean processes, interleaved repeats, nothing finished is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import gradsync

from gradsync import UserError
from gradsync.compare import Plan, _check, _parser


def _plan(*arguments: str, output: str = "unused") -> Plan:
    return Plan(_parser().parse_args(list(arguments)), [], Path(output))


def test_repeats_are_interleaved() -> None:
    runs = _plan("--strategies", "ddp,manual_allreduce", "--repeats", "2", "--devices", "2,4").runs()
    assert [run.name for run in runs] == [
        *("ddp_w2", "manual_allreduce_w2", "ddp_w4", "manual_allreduce_w4"),
        *("ddp_w2_r2", "manual_allreduce_w2_r2", "ddp_w4_r2", "manual_allreduce_w4_r2"),
    ]


def test_devices_count_training_processes_and_everything_else_is_the_same() -> None:
    plan = _plan("--devices", "3", "--seed", "7", "--batch-size", "5")
    fits = {run.strategy: run.arguments for run in plan.runs()}
    counts = {name: fit[fit.index("--trainer.devices") + 1] for name, fit in fits.items()}
    assert counts == {"ddp": "3", "manual_allreduce": "3", "parameter_server": "4"}
    others = {tuple(part for part in fit if part not in fits and part not in counts.values()) for fit in fits.values()}
    assert len(others) == 1


@pytest.mark.parametrize("extra", [["--trainer.strategy.servers", "2"], ["--trainer.strategy.servers=2"]])
def test_more_servers_are_more_processes_not_fewer_that_train(extra: list[str]) -> None:
    plan = Plan(_parser().parse_args(["--strategies", "parameter_server", "--devices", "3"]), extra, Path("unused"))
    fit = plan.runs()[0].arguments
    assert fit[fit.index("--trainer.devices") + 1] == "5"


def test_every_knob_reaches_the_runs() -> None:
    plan = _plan(
        *("--epochs", "9", "--batch-size", "8", "--workers", "1", "--data-dir", "D", "--backend", "gloo"),
        *("--weights", "W.pth"),
    )
    fit = " ".join(plan.fit_arguments("ddp", 2))
    for flag in (
        "--trainer.max_epochs 9", "--data.batch_size 8", "--data.num_workers 1", "--data.root D",
        "--trainer.strategy.process_group_backend gloo", "--trainer.accelerator cpu", "--model.weights W.pth",
    ):  # fmt: skip
        assert flag in fit


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results_ps.json").write_text("{}")
    with pytest.raises(UserError, match="holds results already"):
        _check(_parser().parse_args([]), [], tmp_path)


def test_an_output_that_cannot_be_written_is_named_before_any_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file/x cannot be written"):
        _check(_parser().parse_args([]), [], tmp_path / "file" / "x")


def test_a_failed_run_leaves_the_results_of_the_others(tmp_path: Path) -> None:
    """``transport`` is no option of manual_allreduce, so that run fails; the other one is reported on."""
    ended = gradsync(
        *("compare", "--strategies", "manual_allreduce,parameter_server", "--epochs", "1", "--output", "out"),
        *("--batch-size", "4", "--workers", "0", "--", "--trainer.strategy.transport", "naive"),
        *("--model.arch", "resnet18", "--trainer.limit_train_batches", "7", "--trainer.limit_val_batches", "1"),
        cwd=tmp_path,
        timeout_s=240,
    )
    out = tmp_path / "out"
    assert ended.code == 1, ended.output
    assert "1 run(s) failed: manual_allreduce" in ended.output
    assert not ended.orphans
    failure = json.loads((out / "failed_all_reduce.json").read_text())
    assert failure["exit_code"] == 2
    assert (out / failure["log"]).is_file()
    result = json.loads((out / "results_ps.json").read_text())
    assert result["complete"]
    assert (result["method"], result["world_size"], result["num_workers"]) == ("Parameter Server (PS)", 3, 2)
    assert len(result["all_losses"]) == 7
    assert "Manual All-Reduce" in (out / "performance_report.txt").read_text()
    assert len(list((out / "plots").glob("*.png"))) == 5
