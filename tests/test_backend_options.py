"""``backend_options``: what gloo and NCCL read from the environment, checked, and there before the group starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from distributed import run_distributed
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, num_processes, quiet

from gradsync.callbacks.run_environment import strategy_options
from gradsync.errors import UserError
from gradsync.lightning_cli import GradsyncCLI
from gradsync.strategies.backend_options import apply_backend_options, check_backend_options
from gradsync.strategy_flag import expand

GOOD = {"NCCL_ALGO": "^Ring,Tree", "NCCL_BUFFSIZE": 8388608, "NCCL_P2P_DISABLE": True, "NCCL_SOCKET_IFNAME": "=eth0"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("NCCL_ALG", "Ring", "unknown name 'NCCL_ALG'; nearest: NCCL_ALGO"),
        ("nccl_algo", "Ring", "unknown name 'nccl_algo'; nearest: NCCL_ALGO"),
        ("NCCL_ALGO", "Rong", "NCCL_ALGO must be Tree, Ring, .*, got 'Rong'"),
        ("NCCL_BUFFSIZE", "4M", "NCCL_BUFFSIZE must be a whole number >= 0, got '4M'"),
        ("NCCL_IB_DISABLE", 2, "NCCL_IB_DISABLE must be 0 or 1, got '2'"),
        (
            "GLOO_SOCKET_IFNAME",
            "lo,none7",
            r"GLOO_SOCKET_IFNAME must be interfaces of this host \(.*lo.*\), got 'lo,none7'",
        ),
    ],
)
def test_names_and_values_are_checked(name: str, value: Any, told: str) -> None:
    with pytest.raises(UserError, match=f"^--trainer.strategy.backend_options: {told}"):
        check_backend_options({name: value})


def test_good_ones_become_text() -> None:
    assert check_backend_options(GOOD) == {name: str(int(v) if v is True else v) for name, v in GOOD.items()}
    assert check_backend_options(None) == {}


def test_another_backends_and_those_that_come_too_late_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with pytest.raises(UserError, match=r"NCCL_ALGO does nothing here: gradients travel by gloo"):
        apply_backend_options({"NCCL_ALGO": "Ring"}, "gloo", group_exists=False)
    with pytest.raises(UserError, match=r"this process has its process group already"):
        apply_backend_options({"NCCL_ALGO": "Ring"}, "nccl", group_exists=True)
    apply_backend_options({"NCCL_ALGO": "Tree"}, "nccl", group_exists=True)  # as it was for the first fit
    apply_backend_options({"NCCL_ALGO": "Ring"}, "nccl", group_exists=False)
    assert os.environ["NCCL_ALGO"] == "Ring"


def fit(rank: int, name: str, processes: int) -> tuple[Any, Any]:
    """What the environment held when the group was formed, and what banner and result file show."""
    quiet()
    del os.environ["GLOO_SOCKET_IFNAME"]
    seen, form = [], dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: [
        seen.append(os.environ["GLOO_SOCKET_IFNAME"]),
        form(*args, **kwargs),
    ]
    strategy = make_strategy(name, {"backend_options": {"GLOO_SOCKET_IFNAME": "lo"}})
    make_trainer(strategy, processes, max_steps=1).fit(Mlp(), DataLoader(make_data(), batch_size=8))
    return seen, strategy_options(strategy).get("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize("name", ["manual_allreduce", "parameter_server", "sharded_server"])
def test_there_before_the_group_starts_and_shown(name: str) -> None:
    processes = num_processes(name, 2)
    results = run_distributed(fit, processes, name, processes)
    assert {shown for _, shown in results} == {"lo"}
    assert {tuple(seen) for seen, _ in results} <= {("lo",), ()}  # a server forms no group
    assert ["lo"] in [seen for seen, _ in results]


@pytest.mark.parametrize("as_file", [False, True])
def test_by_flag_and_by_file(as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "tuning.yaml"
    config.write_text(
        "trainer:\n  strategy:\n    init_args:\n      backend_options: {NCCL_ALGO: Ring, NCCL_BUFFSIZE: 4194304}\n"
    )
    by_flag = ["--trainer.strategy.backend_options", '{"NCCL_ALGO": "Ring", "NCCL_BUFFSIZE": 4194304}']
    given = ["--trainer.strategy", "manual_allreduce", *(["--config", str(config)] if as_file else by_flag)]
    seen: list[Any] = []
    monkeypatch.setattr(
        GradsyncCLI, "_run_subcommand", lambda cli, name: seen.append(cli.trainer.strategy.backend_options)
    )
    arguments = ["fit", *given, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--model.arch", "resnet18"]
    monkeypatch.setattr(sys, "argv", ["gradsync", *expand(arguments)])
    GradsyncCLI.from_command_line()
    assert seen == [{"NCCL_ALGO": "Ring", "NCCL_BUFFSIZE": "4194304"}]
