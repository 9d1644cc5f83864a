"""Lightning's profilers under every strategy: they name what we do, and a server that never trains is no trouble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from distributed import run_distributed
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet

from gradsync import STRATEGIES

PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
CASES: list[tuple[str, int, dict[str, Any], set[str]]] = [
    ("ddp", 2, {}, set()),
    ("manual_allreduce", 2, {}, {"all_reduce", "wait"}),
    ("sharded_server", 2, {}, {"reduce_scatter", "all_gather", "wait for all parameters"}),
    ("sharded_server", 2, {"transport": "collective"}, {"reduce_scatter", "all_gather"}),
    ("parameter_server", 3, {}, {"push", "wait", "pull"}),
    ("parameter_server", 3, {"mode": "async", "transport": "ipc"}, {"push", "wait", "pull"}),
    ("parameter_server", 4, {"servers": 2}, {"push", "wait", "pull"}),
]
OF_SERVERS = {"receive", "reduce", "optimizer", "send"}


def _fit(rank: int, strategy: str, processes: int, options: dict[str, Any], kind: str, folder: str) -> str:
    """Returns what the profiler of this process tells."""
    quiet()
    pl.seed_everything(1, verbose=False)
    own = Path(folder) / str(rank)
    profiler = PROFILERS[kind](dirpath=own, filename="report")
    runner = make_trainer(make_strategy(strategy, options), processes, profiler=profiler, max_steps=8)
    runner.fit(Mlp(), DataLoader(make_data(), batch_size=8))
    assert runner.profiler is profiler
    return "\n".join(path.read_text() for path in own.glob("*"))


def _name(kind: str, action: str, strategy: str) -> str:
    return f"gradsync::{action}" if kind == "pytorch" else f"[Strategy]{STRATEGIES[strategy].__name__}.{action}"


def _in_order(value: Any) -> str:
    """Sets as lists: processes that share the tests must call them alike."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize("kind", PROFILERS)
@pytest.mark.parametrize(("strategy", "processes", "options", "actions"), CASES, ids=_in_order)
def test_a_profiler_names_what_a_strategy_does(
    strategy: str, processes: int, options: dict[str, Any], actions: set[str], kind: str, tmp_path: Path
) -> None:
    reports = run_distributed(_fit, processes, strategy, processes, options, kind, str(tmp_path))
    num_servers = options.get("servers", 1) if strategy == "parameter_server" else 0
    for report in reports[num_servers:]:
        assert report
        assert {action for action in actions if _name(kind, action, strategy) in report} == actions
    # torch's profiler, as Lightning drives it, goes by training steps
    for report in reports[:num_servers] if kind != "pytorch" else ():
        assert {action for action in OF_SERVERS if _name(kind, action, strategy) in report} == OF_SERVERS
