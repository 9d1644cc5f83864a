"""Several runs beside each other between the two hosts of :mod:`namespaces`, so that one cut is one for all of them."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from distributed import Rank, run_distributed, run_ranks
from namespaces import ADDRESSES, NAMES, TwoHosts
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet, train

from gradsync.callbacks import FailureChannel, StopOnSignal
from gradsync.explain import one_line
from gradsync.keys import make_keys

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
    """At one step every worker waits until all are there and the test has done what it does to the link.

    Then ``fault`` may happen: ``raise`` in the last worker, or ``kill server``.
    """

    def __init__(self, folder: Path, place: Place, fault: str | None) -> None:
        super().__init__()
        self.folder, self.place, self.fault = folder, place, fault

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == CUT_AT:
            (self.folder / f"here {self.place.run} {self.global_rank}").touch()
            await_file(self.folder / "go")
            if self.fault == "raise" and self.global_rank == self.trainer.world_size - 1:
                raise ArithmeticError("boom in training")
            if self.fault == "kill server" and self.global_rank == 0:
                strategy: Any = self.trainer.strategy
                os.kill(int(strategy.store.get("pid 0")), signal.SIGKILL)
        return super().training_step(batch, index)


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def _enter(hosts: TwoHosts, folder: Path, rank: int) -> dict[str, str]:
    place = PLACES[rank]
    hosts.enter(place.host)
    tempfile.tempdir = os.environ["TMPDIR"] = str(
        folder / NAMES[place.host]
    )  # names of files there hold process numbers
    del os.environ["GLOO_SOCKET_IFNAME"]  # as on hosts that nobody has prepared
    port = 29500 + list(RUNS).index(place.run)
    address = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port)}
    return {**address, "NODE_RANK": str(place.host), "LOCAL_RANK": str(place.local_rank)}


def _fit(rank: int, folder: Path, step_timeout_s: float, faults: dict[str, str]) -> dict[str, Any]:
    quiet()
    place = PLACES[rank]
    run = RUNS[place.run]
    pl.seed_everything(1, verbose=False)
    options = {**run.options, "step_timeout_s": step_timeout_s}
    if run.strategy == "parameter_server":
        options |= {"keys": folder / "keys", "server_log_every_n_steps": 0}
        if run.options.get("mode"):
            options["record_schedule"] = folder / f"{place.run}.json"
    module = Marked(folder, place, faults.get(place.run))
    callbacks = [FailureChannel(), StopOnSignal()]
    trainer = make_trainer(
        make_strategy(run.strategy, options), run.per_host, num_nodes=2, max_steps=NUM_STEPS, callbacks=callbacks
    )
    try:
        trainer.fit(module, DataLoader(make_data(), batch_size=8))
    except Exception as error:
        return {"error": one_line(error) or repr(error)}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"state": state, "ranks": (trainer.global_rank, trainer.local_rank, trainer.world_size)}


def _num_workers() -> int:
    return sum(2 * run.per_host - run.num_servers for run in RUNS.values())


def train_while(
    hosts: TwoHosts,
    folder: Path,
    act: Callable[[], object],
    step_timeout_s: float = 60,
    faults: dict[str, str] | None = None,
) -> list[Rank]:
    """All runs; ``act`` is called when all workers stand at the marked step, and they go on when it returns."""
    make_keys(folder / "keys")
    for name in NAMES:
        (folder / name).mkdir()
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
    arguments = (folder, step_timeout_s, faults or {})
    try:
        ranks = run_ranks(_fit, len(PLACES), *arguments, timeout_s=150, enter=lambda rank: _enter(hosts, folder, rank))
    finally:
        (folder / "go").touch()
        thread.join()
    assert not failed, failed
    return ranks


def of_run(name: str, ranks: list[Rank]) -> list[Rank]:
    return [rank for rank, place in zip(ranks, PLACES, strict=True) if place.run == name]


def assert_trained(name: str, ranks: list[Rank], folder: Path) -> None:
    """To the bit as all processes on one host; in async and bounded mode that repeat what the servers noted."""
    run, schedule = RUNS[name], None
    if name not in IN_STEP:
        schedule = folder / f"{name}.json"
        applied = json.loads(schedule.read_text())
        assert {worker: applied.count(worker) for worker in range(3)} == dict.fromkeys(range(3), NUM_STEPS)
    expected = _on_one_host(name, schedule)
    for process, rank in enumerate(of_run(name, ranks)):
        assert rank.code == 0, rank.output
        assert "error" not in rank.result, rank.result
        if 0 < process < run.num_servers:
            continue  # the first server alone ends with the weights
        for key, value in rank.result["state"].items():
            assert torch.equal(value, expected[key]), (name, key)


@functools.cache
def _on_one_host(name: str, schedule: Path | None) -> dict[str, torch.Tensor]:
    run = RUNS[name]
    options: dict[str, Any] = {key: value for key, value in run.options.items() if key != "host"}
    if schedule is not None:
        options["replay_schedule"] = schedule
    num_processes = 2 * run.per_host
    limit = {"max_steps": NUM_STEPS}
    return run_distributed(train, num_processes, run.strategy, num_processes, None, limit, options)[0]
