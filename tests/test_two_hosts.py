"""Runs between two hosts, and what becomes of them when the link is slow, cut for a while, or cut for good.

Several runs go on beside each other between the same hosts, so that one cut of the link is one for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from commands import run_command, tiny_fit
from distributed import Rank, run_distributed, run_ranks
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet, train
from two_hosts import ADDRESSES, NAMES, TwoHosts, two_hosts

from gradsync.callbacks import FailureChannel, StopOnSignal
from gradsync.errors import UserError
from gradsync.explain import one_line
from gradsync.keys import make_keys
from gradsync.strategies import ParameterServerStrategy

NUM_STEPS, CUT_AT = 20, 7
TCP = {"transport": "tcp", "host": ADDRESSES[0]}


@dataclass(frozen=True)
class Run:
    """One of those that go on beside each other, with as many processes on each host."""

    strategy: str
    options: dict[str, Any]
    per_host: int

    @property
    def num_servers(self) -> int:
        return self.options.get("servers", 1) if self.strategy == "parameter_server" else 0


RUNS = {
    "manual_allreduce": Run("manual_allreduce", {}, 1),
    "sync": Run("parameter_server", TCP, 2),
    "two servers": Run("parameter_server", {**TCP, "servers": 2}, 3),
    "async": Run("parameter_server", {**TCP, "mode": "async"}, 2),
    "bounded": Run("parameter_server", {**TCP, "mode": "bounded", "staleness": 2}, 2),
}
IN_STEP = ("manual_allreduce", "sync", "two servers")


@dataclass(frozen=True)
class Place:
    """Of a process among all those of all runs."""

    run: str
    host: int
    local_rank: int


PLACES = [Place(name, h, r) for name, run in RUNS.items() for h in range(2) for r in range(run.per_host)]


class Marked(Mlp):
    """At one step every worker waits until all are there and the test has done what it does to the link."""

    def __init__(self, folder: Path, place: Place) -> None:
        super().__init__()
        self.folder, self.place = folder, place

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == CUT_AT:
            (self.folder / f"here {self.place.run} {self.global_rank}").touch()
            _await(self.folder / "go")
        return super().training_step(batch, index)


def _await(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def _enter(hosts: TwoHosts, rank: int) -> dict[str, str]:
    place = PLACES[rank]
    hosts.enter(place.host)
    del os.environ["GLOO_SOCKET_IFNAME"]  # as on hosts that nobody has prepared
    port = 29500 + list(RUNS).index(place.run)
    address = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port)}
    return {**address, "NODE_RANK": str(place.host), "LOCAL_RANK": str(place.local_rank)}


def _fit(rank: int, folder: Path, step_timeout_s: float) -> dict[str, Any]:
    quiet()
    place = PLACES[rank]
    run = RUNS[place.run]
    pl.seed_everything(1, verbose=False)
    options = {**run.options, "step_timeout_s": step_timeout_s}
    if run.strategy == "parameter_server":
        options |= {"keys": folder / "keys", "server_log_every_n_steps": 0}
        if run.options.get("mode"):
            options["record_schedule"] = folder / f"{place.run}.json"
    module = Marked(folder, place)
    callbacks = [FailureChannel(), StopOnSignal()]
    trainer = make_trainer(
        make_strategy(run.strategy, options), run.per_host, num_nodes=2, max_steps=NUM_STEPS, callbacks=callbacks
    )
    try:
        trainer.fit(module, DataLoader(make_data(), batch_size=8))
    except Exception as error:
        return {"error": one_line(error) or repr(error), "seconds": time.monotonic()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"state": state, "ranks": (trainer.global_rank, trainer.local_rank, trainer.world_size)}


def _num_workers() -> int:
    return sum(2 * run.per_host - run.num_servers for run in RUNS.values())


def _train_while(hosts: TwoHosts, folder: Path, act: Callable[[], None], step_timeout_s: float) -> list[Rank]:
    """All runs; ``act`` is called when all workers stand at the marked step, and they go on when it returns."""
    make_keys(folder / "keys")
    failed: list[BaseException] = []

    def meddle() -> None:
        try:
            deadline = time.monotonic() + 100
            while len(list(folder.glob("here *"))) < _num_workers() and time.monotonic() < deadline:
                time.sleep(0.01)
            act()
        except BaseException as error:
            failed.append(error)
        (folder / "go").touch()

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        ranks = run_ranks(
            _fit, len(PLACES), folder, step_timeout_s, timeout_s=150, enter=lambda rank: _enter(hosts, rank)
        )
    finally:
        (folder / "go").touch()
        thread.join()
    assert not failed, failed
    return ranks


def _of(name: str, ranks: list[Rank]) -> list[Rank]:
    return [rank for rank, place in zip(ranks, PLACES, strict=True) if place.run == name]


def _assert_trained(name: str, ranks: list[Rank], folder: Path) -> None:
    """To the bit as all processes on one host; in async and bounded mode that repeat what the servers noted."""
    run = RUNS[name]
    options: dict[str, Any] = {key: value for key, value in run.options.items() if key != "host"}
    if name not in IN_STEP:
        applied = json.loads((folder / f"{name}.json").read_text())
        assert {worker: applied.count(worker) for worker in range(3)} == dict.fromkeys(range(3), NUM_STEPS)
        options["replay_schedule"] = folder / f"{name}.json"
    num_processes = 2 * run.per_host
    expected = run_distributed(
        train, num_processes, run.strategy, num_processes, None, {"max_steps": NUM_STEPS}, options
    )
    for rank in _of(name, ranks):
        assert rank.code == 0, rank.output
        assert "error" not in rank.result, rank.result
        for key, value in rank.result["state"].items():
            assert torch.equal(value, expected[0][key]), (name, key)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as found:
        yield found


# -- as it should be ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    ranks: list[Rank]
    folder: Path
    listeners: list[set[str]]


@pytest.fixture(scope="module")
def undisturbed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("undisturbed")
    listeners: list[set[str]] = []
    ranks = _train_while(hosts, folder, lambda: listeners.extend(hosts.listeners(h) for h in range(2)), 60)
    return Trained(ranks, folder, listeners)


@pytest.mark.parametrize("name", RUNS)
def test_two_hosts_train_as_one_does_to_the_bit(undisturbed: Trained, name: str) -> None:
    _assert_trained(name, undisturbed.ranks, undisturbed.folder)


def test_ranks_are_counted_on_every_host(undisturbed: Trained) -> None:
    """(rank, rank on its host, number) of workers; servers come after the last and are nobody's rank 0."""
    found = [rank.result["ranks"] for rank in _of("two servers", undisturbed.ranks)]
    assert found[2:] == [(0, 0, 4), (1, 0, 4), (2, 1, 4), (3, 2, 4)]
    assert all(rank >= 4 and local > 0 and world == 4 for rank, local, world in found[:2])


def test_nothing_listens_elsewhere_than_on_the_link(undisturbed: Trained) -> None:
    assert undisturbed.listeners == [{ADDRESSES[0]}, {ADDRESSES[1]}]
