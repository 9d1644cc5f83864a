"""The command line: strategies by flag with options, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import gradsync, run_command, tiny_fit
from lightning.pytorch.strategies import DDPStrategy

from gradsync import STRATEGIES, UserError
from gradsync.lightning_cli import GradsyncCLI
from gradsync.strategy_flag import check_name, class_path, expand

ALL_REDUCE = class_path(STRATEGIES["manual_allreduce"])


def test_a_registered_name_becomes_its_class_and_comes_before_its_options() -> None:
    options = ["--trainer.strategy.bucket_mib", "4"]
    wanted = ["fit", "--trainer.strategy", ALL_REDUCE, *options]
    assert expand(["fit", "--trainer.strategy", "manual_allreduce", *options]) == wanted
    assert expand(["fit", *options, "--trainer.strategy=manual_allreduce"]) == wanted


def test_expansion_is_idempotent() -> None:
    """Child processes run the expanded arguments again."""
    once = expand(["fit", "--trainer.strategy", "manual_allreduce", "--trainer.strategy.overlap", "false"])
    assert expand(once) == once


def test_lightnings_names_stay_unless_they_have_options() -> None:
    assert expand(["fit", "--trainer.strategy", "ddp"]) == ["fit", "--trainer.strategy", "ddp"]
    with_option = expand(["fit", "--trainer.strategy", "ddp", "--trainer.strategy.timeout", "00:01:00"])
    assert with_option[1:3] == ["--trainer.strategy", class_path(DDPStrategy)]
    assert expand(["fit", "--trainer.devices", "2"]) == ["fit", "--trainer.devices", "2"]


@pytest.mark.parametrize("name", ["manual_allreduce", "ddp", "auto", "some.module.Strategy", "ManualAllReduceStrategy"])
def test_known_names_and_class_paths_pass(name: str) -> None:
    check_name(name)


def test_an_unknown_strategy_lists_ours_and_lightnings() -> None:
    with pytest.raises(
        UserError, match=r"unknown .*'bytes_ps': gradsync has manual_allreduce, parameter_server, sharded_server; .*ddp"
    ):
        check_name("bytes_ps")


@pytest.mark.parametrize(
    ("strategy", "option", "value", "message"),
    [
        ("manual_allreduce", "bucket_mib", "-1", "bucket_mib must be > 0 MiB or auto, got -1"),
        ("manual_allreduce", "algorithm", "magic", "algorithm must be one of auto, naive, .* got 'magic'"),
        ("manual_allreduce", "process_group_backend", "mpi", "must be gloo or nccl, got 'mpi'"),
        (
            "parameter_server",
            "transport",
            "pigeon",
            "transport must be one of auto, shared_memory, .* got 'pigeon'",
        ),
        ("parameter_server", "part_mib", "0", "part_mib must be > 0 MiB"),
        ("parameter_server", "step_timeout_s", "0", "step_timeout_s must be > 0 seconds"),
    ],
)
def test_a_bad_option_is_named_with_what_is_wanted(strategy: str, option: str, value: str, message: str) -> None:
    converted = float(value) if value.lstrip("-").isdigit() else value
    with pytest.raises(UserError, match=message):
        STRATEGIES[strategy](**{option: converted})


def test_options_and_yaml_reach_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "strategy.yaml"
    config.write_text(
        "trainer:\n  strategy:\n    class_path: gradsync.ManualAllReduceStrategy\n    init_args: {bucket_mib: 2}\n"
    )
    seen = []
    monkeypatch.setattr(GradsyncCLI, "_run_subcommand", lambda cli, name: seen.append(cli.trainer.strategy.options))
    common = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--model.arch", "resnet18"]
    for given in (
        ["--trainer.strategy", "manual_allreduce", "--trainer.strategy.bucket_mib", "2"],
        ["--trainer.strategy=ManualAllReduceStrategy", "--trainer.strategy.bucket_mib=2"],
        ["--config", str(config)],
    ):
        monkeypatch.setattr(sys, "argv", ["gradsync", *expand(["fit", *given, *common])])
        GradsyncCLI.from_command_line()
    assert [options["bucket_mib"] for options in seen] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["train"], 2, "unknown command 'train'; there are fit, validate"),
        (["fit", "--trainer.strategy", "bagua"], 1, "gradsync: error: unknown --trainer.strategy 'bagua'"),
        (["fit", "--trainer.strategy", "parameter_server", "--trainer.devices", "1"], 1, "at least 2 processes"),
        (["fit", "--trainer.devices", "1", "--data.root", "nowhere"], 1, "--data.root"),
        (["fit", "--model.arch", "resnet19"], 1, "resnet18"),
        (
            ["fit", "--trainer.strategy=manual_allreduce", "--trainer.strategy.bucket_mib=0"],
            1,
            "bucket_mib must be > 0",
        ),
        (["report", "nowhere"], 1, "There is no folder nowhere"),
        (["compare", "--data-dir", "nowhere"], 1, "nowhere"),
        (["compare", "--strategies", "ddp,horovod"], 1, "unknown --trainer.strategy 'horovod'"),
        (["compare", "--strategies", "ddp,no.such.Strategy"], 1, "'no.such.Strategy' cannot be imported"),
        (["compare", "--weights", "missing.pth"], 1, "there is no file missing.pth"),
        (["compare", "--epochs", "0"], 2, "whole number >= 1, got '0'"),
        (["compare", "--epoch", "3"], 2, "--epoch"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], code: int, text: str, tmp_path: Path) -> None:
    if arguments[0] == "fit":
        arguments = [*arguments, "--trainer.accelerator", "cpu"]
    ended = gradsync(*arguments, cwd=tmp_path)
    assert ended.code == code, ended.output
    assert text in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(("strategy", "processes"), [("manual_allreduce", 2), ("parameter_server", 3)])
def test_under_torchrun(strategy: str, processes: int, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    fit = [*tiny_fit(strategy, processes), "--run_dir", "run"]
    at = fit.index("--trainer.devices")
    del fit[at : at + 2]  # torchrun's number counts
    ended = run_command([*torchrun, "-m", "gradsync", *fit], tmp_path)
    assert ended.code == 0, ended.output
    assert not ended.orphans
    results = json.loads(next((tmp_path / "run").glob("results_*.json")).read_text())
    assert results["complete"]
    assert results["world_size"] == processes
    assert results.get("num_workers") == (2 if strategy == "parameter_server" else None)


def test_torchruns_number_and_ours_must_agree(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    ended = run_command([*torchrun, "-m", "gradsync", *tiny_fit("manual_allreduce", 2)], tmp_path)
    assert ended.code == 1
    assert "torchrun started 1 processes here, but --trainer.devices says 2" in ended.output


def test_ctrl_c_ends_all_processes_with_code_130(tmp_path: Path) -> None:
    """Sent to every process of the terminal's group, as a terminal does."""
    arguments = [*tiny_fit("parameter_server", 3), "--trainer.max_epochs", "1000000"]
    ended = gradsync(*arguments, cwd=tmp_path, interrupt_at="epoch 1/")
    assert ended.code == 130, ended.output
    assert not ended.orphans
