"""``gradsync compare``: clean processes, interleaved repeats, nothing finished is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import gradsync

from gradsync import UserError
from gradsync.compare import Plan, _check, _parser
from gradsync.report.methods import split_stem
from gradsync.strategy_variant import Variant


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
    fits = {run.method.strategy: run.arguments for run in plan.runs()}
    counts = {name: fit[fit.index("--trainer.devices") + 1] for name, fit in fits.items()}
    assert counts == {"ddp": "3", "manual_allreduce": "3", "parameter_server": "4"}
    others = {tuple(part for part in fit if part not in fits and part not in counts.values()) for fit in fits.values()}
    assert len(others) == 1


@pytest.mark.parametrize("extra", [["--trainer.strategy.servers", "2"], ["--trainer.strategy.servers=2"]])
def test_more_servers_are_more_processes_not_fewer_that_train(extra: list[str]) -> None:
    plan = Plan(_parser().parse_args(["--strategies", "parameter_server", "--devices", "3"]), extra, Path("unused"))
    fit = plan.runs()[0].arguments
    assert fit[fit.index("--trainer.devices") + 1] == "5"


VARIANTS = "ddp,parameter_server,parameter_server:mode=async,parameter_server:servers=2+transport=tcp"


def _variants(text: str, *extra: str) -> Plan:
    return Plan(_parser().parse_args(["--strategies", text, "--devices", "3"]), list(extra), Path("unused"))


def test_variants_have_names_files_and_labels_of_their_own() -> None:
    runs = _variants(VARIANTS).runs()
    assert [(run.name, run.stem, run.method.name) for run in runs] == [
        ("ddp", "baseline_ddp", "Baseline DDP (PyTorch)"),
        ("parameter_server", "ps", "Parameter Server (PS)"),
        ("parameter_server-mode-async", "ps-mode-async", "Parameter Server (PS), mode async"),
        (
            "parameter_server-servers-2-transport-tcp",
            "ps-servers-2-transport-tcp",
            "Parameter Server (PS), servers 2, transport tcp",
        ),
    ]


def test_options_of_a_variant_reach_its_own_run_only_and_win_over_those_for_all() -> None:
    plain, tcp = _variants("ddp,parameter_server:transport=tcp", "--trainer.strategy.transport", "ipc").runs()
    assert tcp.arguments[-4:] == ["--trainer.strategy.transport", "tcp", "--variant", "transport=tcp"]
    assert plain.arguments[-2:] == ["--trainer.strategy.transport", "ipc"]


def test_servers_of_a_variant_are_processes_on_top() -> None:
    class_path = "gradsync.ParameterServerStrategy:servers=3"
    plan = _variants(f"{VARIANTS},{class_path}", "--trainer.strategy.servers=4")
    counts = [run.arguments[run.arguments.index("--trainer.devices") + 1] for run in plan.runs()]
    assert counts == ["3", "7", "7", "5", "6"]


def test_counts_and_repeats_come_after_the_variant() -> None:
    plan = _plan("--strategies", "parameter_server:part_mib=2", "--devices", "2,4", "--repeats", "2")
    assert [run.stem for run in plan.runs()][-1] == "ps-part-mib-2_w4_r2"
    assert split_stem("ps-part-mib-2_w4_r2").base == plan.runs()[0].method.stem


def test_the_same_variant_twice_counts_once() -> None:
    twice = "ddp, ddp,parameter_server:servers=2+mode=async,parameter_server:mode=async+servers=2"
    assert [run.name for run in _variants(twice).runs()] == ["ddp", "parameter_server-servers-2-mode-async"]


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ("parameter_server:server=2", "has no option 'server'; it has .*servers"),
        ("manual_allreduce:transport=tcp", "has no option 'transport'; it has algorithm"),
        ("parameter_server:servers=two", "servers must be >= 1, got two"),
        ("parameter_server:part_mib=two", "part_mib must be float, got 'two'"),
        ("parameter_server:transport=pigeon", "transport must be one of"),
        ("parameter_server:servers=2+transport=naive", "knows one server only"),
        ("parameter_server:staleness=2", "staleness is the bound of"),
        ("ddp:bucket_cap=2", "ddp has no option 'bucket_cap'"),
        ("fsdp:x=1", "options go with ddp, manual_allreduce"),
        ("parameter_server:mode", "'mode' is no OPTION=VALUE"),
        ("parameter_server:", "'' is no OPTION=VALUE"),
        ("parameter_server:mode=sync+mode=async", "mode is there twice"),
        ("parameter_server,gradsync.ParameterServerStrategy", "would write the same files"),
        ("parameter_servers:mode=async", "unknown --trainer.strategy"),
    ],
)
def test_a_bad_variant_is_one_clear_error_before_any_run(strategies: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        _check(_parser().parse_args(["--strategies", strategies]), [], tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_variant_may_rely_on_options_for_all(tmp_path: Path) -> None:
    options = _parser().parse_args(["--strategies", "parameter_server:staleness=2,ddp:bucket_cap_mb=5"])
    _check(options, ["--trainer.strategy.mode", "bounded"], tmp_path)


def test_every_knob_reaches_the_runs() -> None:
    plan = _plan(
        *("--epochs", "9", "--batch-size", "8", "--workers", "1", "--data-dir", "D", "--backend", "gloo"),
        *("--weights", "W.pth"),
    )
    fit = " ".join(plan.fit_arguments(Variant("ddp"), 2))
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
    """``transport`` is no option of manual_allreduce, so that run fails; two variants are reported on."""
    strategies = "manual_allreduce,parameter_server,parameter_server:servers=2+transport=tcp"
    ended = gradsync(
        *("compare", "--strategies", strategies, "--epochs", "1", "--output", "out"),
        *("--batch-size", "4", "--workers", "0", "--", "--trainer.strategy.transport", "naive"),
        *("--model.arch", "resnet18", "--trainer.limit_train_batches", "7", "--trainer.limit_val_batches", "1"),
        cwd=tmp_path,
        timeout_s=800,
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
    variant = json.loads((out / "results_ps-servers-2-transport-tcp.json").read_text())
    assert (variant["world_size"], variant["num_workers"], variant["variant"]) == (4, 2, "servers=2+transport=tcp")
    assert variant["method"] == "Parameter Server (PS), servers 2, transport tcp"
    assert variant["environment"]["strategy_options"]["transport"] == "tcp"
    assert (out / "tensorboard" / "parameter_server-servers-2-transport-tcp" / "server_1").is_dir()
    assert "Manual All-Reduce" in (out / "performance_report.txt").read_text()
    assert len(list((out / "plots").glob("*.png"))) == 5
