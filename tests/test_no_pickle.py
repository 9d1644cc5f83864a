"""Nothing that comes through a socket is unpickled: not by what the sources say, and not in a run."""

from __future__ import annotations

import ast
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from training import train

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "comm").rglob("*.py")),
    *sorted((ROOT / "strategies").glob("serv*.py")),
    *(ROOT / "strategies" / name for name in ("store_control_plane.py", "metric_sync.py", "parameter_server.py")),
]
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load"}
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized", "recv_object_list", "broadcast_object_list"}
FORBIDDEN_METHODS |= {"all_gather_object", "gather_object", "scatter_object_list"}


def _violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module and node.module.partition(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_sources_that_talk_to_others_unpickle_and_evaluate_nothing(path: Path) -> None:
    assert _violations(path.read_text()) == []


def test_what_would_unpickle_is_found() -> None:
    text = "import pickle\nfrom yaml import load\na = x.recv_pyobj()\nb = torch.load(f)\nc = eval(s)\nnet.eval()"
    assert _violations(text) == ["pickle", "yaml", "x.recv_pyobj", "torch.load", "eval"]


def _watched(rank: int, processes: int, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Classes that this process unpickled in a run, and afterwards in one object of ours: proof that it is seen."""
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            found.append(".".join(map(str, arguments)))

    data = pickle.dumps(OrderedDict())
    sys.addaudithook(hook)
    train(rank, "parameter_server", processes, {"optimizer": "adamw"}, {"enable_checkpointing": False}, options)
    in_run = list(found)
    pickle.loads(data)
    return in_run, found[len(in_run) :]


@pytest.mark.parametrize("options", [{}, {"transport": "tcp"}, {"mode": "async"}, {"servers": 2, "transport": "ipc"}])
def test_a_process_that_serves_unpickles_nothing(options: dict[str, Any]) -> None:
    servers = options.get("servers", 1)
    results = run_distributed(_watched, servers + 2, servers + 2, options)
    assert all(control == ["collections.OrderedDict"] for _, control in results)
    # in sync the workers have a process group, over which Lightning sends them objects
    quiet = results if options.get("mode") else results[:servers]
    assert [in_run for in_run, _ in quiet] == [[] for _ in quiet]
