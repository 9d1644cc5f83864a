"""Runs between two hosts, and what becomes of them when the link is slow, cut for a while, or cut for good."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import Ended, run_command, tiny_fit
from distributed import Rank, run_distributed, run_ranks
from namespaces import ADDRESSES, NAMES, TwoHosts, two_hosts
from training import make_trainer, train
from two_host_runs import NUM_STEPS, RUNS, TCP, assert_trained, await_file, of_run, train_while

from gradsync.comm.silence import limit_silence
from gradsync.errors import UserError
from gradsync.keys import make_keys
from gradsync.strategies import ParameterServerStrategy


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
    ranks = train_while(hosts, folder, lambda: listeners.extend(hosts.listeners(h) for h in range(2)))
    return Trained(ranks, folder, listeners)


@pytest.mark.parametrize("name", RUNS)
def test_two_hosts_train_as_one_does_to_the_bit(undisturbed: Trained, name: str) -> None:
    assert_trained(name, undisturbed.ranks, undisturbed.folder)


def test_ranks_are_counted_on_every_host(undisturbed: Trained) -> None:
    """(rank, rank on its host, number) of workers; servers come after the last and are nobody's rank 0."""
    found = [rank.result["ranks"] for rank in of_run("two servers", undisturbed.ranks)]
    assert found[2:] == [(0, 0, 4), (1, 0, 4), (2, 1, 4), (3, 2, 4)]
    assert all(rank >= 4 and local > 0 and world == 4 for rank, local, world in found[:2])


def test_nothing_listens_elsewhere_than_on_the_link(undisturbed: Trained) -> None:
    assert undisturbed.listeners == [{ADDRESSES[0]}, {ADDRESSES[1]}]


# -- the link is cut ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_for_10_s(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """From the marked step on: workers go on into it, and push."""
    folder = tmp_path_factory.mktemp("cut")

    def cut() -> None:
        hosts.cut()
        (folder / "go").touch()
        time.sleep(10)
        hosts.heal()

    return Trained(train_while(hosts, folder, cut), folder, [])


@pytest.mark.parametrize("name", RUNS)
def test_a_link_that_is_cut_for_10_s_costs_nothing_but_time(cut_for_10_s: Trained, name: str) -> None:
    assert_trained(name, cut_for_10_s.ranks, cut_for_10_s.folder)


@pytest.fixture(scope="module")
def cut_for_good(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    try:
        return train_while(hosts, tmp_path_factory.mktemp("gone"), hosts.cut, step_timeout_s=6)
    finally:
        hosts.heal()


def _said(rank: Rank) -> str:
    """What it ends with: an exception, or what it prints before it ends at once."""
    if rank.result is not None:
        return rank.result.get("error", "it ended well")
    return "".join(line for line in rank.output.splitlines(True) if line.startswith("gradsync: error:"))


def _by_host(name: str, ranks: list[Rank]) -> tuple[list[str], list[str]]:
    """What all processes of a run say in the end, on the first host and on the second one."""
    found = of_run(name, ranks)
    assert all(rank.code is not None for rank in found), "a process waits for ever"
    said, per_host = [_said(rank) for rank in found], RUNS[name].per_host
    return said[:per_host], said[per_host:]


@pytest.mark.parametrize("name", RUNS)
def test_a_link_that_stays_cut_ends_both_sides_with_who_is_missing(cut_for_good: list[Rank], name: str) -> None:
    here, there = _by_host(name, cut_for_good)
    workers = ", ".join(str(number) for number in range(1, 1 + RUNS[name].per_host))
    missing = {
        "manual_allreduce": "rank(s) 1 did not take part",
        "async": "rank 1 did not take part",  # who waits for nobody notices at the end
    }.get(name, f"worker(s) {workers} did not push the step that the others wait for")
    assert all(missing in text for text in here), here
    without = "rank(s) 0 did not take part" if name == "manual_allreduce" else "the parameter server did not answer"
    assert all(without in text for text in there), there


def _read_store(rank: int, folder: Path) -> str | None:
    store = dist.TCPStore(ADDRESSES[0], 29400, is_master=rank == 0, wait_for_workers=False)
    limit_silence(29400, 4)
    (folder / f"here {rank}").touch()
    await_file(folder / "go")
    try:
        store.check(["key"])
    except dist.DistError as error:
        return type(error).__name__
    finally:
        if rank == 1:
            (folder / "end").touch()
        await_file(folder / "end")
    return None


def test_a_read_from_the_store_beyond_the_cut_ends(hosts: TwoHosts, tmp_path: Path) -> None:
    """By itself it takes a quarter of an hour."""

    def cut() -> None:
        while len(list(tmp_path.glob("here *"))) < 2:
            time.sleep(0.01)
        hosts.cut()
        (tmp_path / "go").touch()

    def enter(rank: int) -> dict[str, str]:
        hosts.enter(rank)
        return {}

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        near, far = run_ranks(_read_store, 2, tmp_path, enter=enter)
    finally:
        (tmp_path / "here 0").touch()
        (tmp_path / "here 1").touch()
        thread.join()
        hosts.heal()
    assert (near.result, far.code, far.result is not None) == (None, 0, True), (near, far)


# -- the link is slow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slowed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """1 Mbit/s for all runs together, from the marked step on: each of these would take a few milliseconds."""
    folder = tmp_path_factory.mktemp("slow")
    try:
        return Trained(train_while(hosts, folder, lambda: hosts.limit(1)), folder, [])
    finally:
        hosts.unlimit()


@pytest.mark.parametrize("name", RUNS)
def test_a_slow_link_makes_runs_slower_and_nothing_else(slowed: Trained, name: str) -> None:
    assert_trained(name, slowed.ranks, slowed.folder)


def test_in_async_mode_the_worker_beside_the_server_does_not_wait_for_the_link(slowed: Trained) -> None:
    applied = json.loads((slowed.folder / "async.json").read_text())
    when_it_ended = applied[: len(applied) - applied[::-1].index(0)]
    assert all(when_it_ended.count(worker) < 3 * NUM_STEPS / 4 for worker in (1, 2)), applied


def test_in_bounded_mode_it_waits_at_the_bound(slowed: Trained) -> None:
    applied = json.loads((slowed.folder / "bounded.json").read_text())
    counts = [[applied[: end + 1].count(worker) for worker in range(3)] for end in range(len(applied))]
    assert max(max(count) - min(count) for count in counts) == RUNS["bounded"].options["staleness"] + 1


# -- a process fails ---------------------------------------------------------------------------------------------------

FAULTS = {
    "manual_allreduce": "raise",
    "sync": "kill server",
    "two servers": "raise",
    "async": "raise",
    "bounded": "kill server",
}


@pytest.fixture(scope="module")
def failed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    return train_while(hosts, tmp_path_factory.mktemp("failed"), lambda: None, faults=FAULTS)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault == "raise"])
def test_an_exception_on_one_host_is_told_on_the_other(failed: list[Rank], name: str) -> None:
    here, there = _by_host(name, failed)
    assert all("ArithmeticError" in text and "boom in training" in text for text in here + there), here + there


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault == "kill server"])
def test_a_server_that_is_killed_is_named_on_the_other_host(failed: list[Rank], name: str) -> None:
    (_, beside), there = _by_host(name, failed)
    assert "server 0 was killed" in beside
    assert all(f"server 0 on {NAMES[0]} has ended: nobody listens at" in text for text in there), there


# -- commands ----------------------------------------------------------------------------------------------------------


def _torchrun(hosts: TwoHosts, folder: Path, per_host: int, *fit: str) -> list[str]:
    """On every host; what they print."""
    names = ["--nnodes=2", f"--nproc-per-node={per_host}", f"--master-addr={ADDRESSES[0]}", "--master-port=29400"]

    def run(host: int) -> str:
        start = [sys.executable, "-m", "torch.distributed.run", *names, f"--node-rank={host}", "-m", "gradsync"]
        (folder / str(host)).mkdir()
        command = hosts.command(host, "env", "-u", "GLOO_SOCKET_IFNAME", *start, *fit, "--trainer.num_nodes", "2")
        ended = run_command(command, folder / str(host))
        assert ended.code == 0, ended.output
        assert not ended.orphans
        return ended.output

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.parametrize("name", ["manual_allreduce", "sync"])
def test_torchrun_on_each_host_runs_gradsync_fit(hosts: TwoHosts, tmp_path: Path, name: str) -> None:
    run = RUNS[name]
    make_keys(tmp_path / "keys")
    options = [f"--trainer.strategy.{key}={value}" for key, value in run.options.items()]
    options += [f"--trainer.strategy.keys={tmp_path / 'keys'}"] if options else []
    shared = ["--seed_everything=1", "--data.batch_size=8", f"--run_dir={tmp_path / 'run'}"]
    _torchrun(hosts, tmp_path, run.per_host, *tiny_fit(run.strategy, run.per_host), *options, *shared)
    trained = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    num_processes = 2 * run.per_host
    epoch = {"max_epochs": 1, "max_steps": -1}
    plain = {key: value for key, value in run.options.items() if key != "host"}
    expected = run_distributed(train, num_processes, run.strategy, num_processes, None, epoch, plain)[-1]
    assert all(torch.equal(trained[key], expected[key]) for key in trained)


def test_a_killed_worker_is_named_on_the_other_host(hosts: TwoHosts, tmp_path: Path) -> None:
    """Under our own launcher, where another process of its host is left to tell."""
    make_keys(tmp_path / "keys")
    options = [f"--trainer.strategy.{key}={value}" for key, value in {**TCP, "keys": tmp_path / "keys"}.items()]

    def run(host: int) -> Ended:
        (tmp_path / str(host)).mkdir()
        where = [
            f"NODE_RANK={host}",
            f"MASTER_ADDR={ADDRESSES[0]}",
            "MASTER_PORT=29400",
            f"TMPDIR={tmp_path / str(host)}",
        ]
        faults = {"fault": "kill", "process": 1, "at_step": 1} if host == 1 else {}
        fit = [*tiny_fit("parameter_server", 2, **faults), *options, "--trainer.num_nodes=2"]
        command = hosts.command(host, "env", "-u", "GLOO_SOCKET_IFNAME", *where, sys.executable, "-m", "gradsync", *fit)
        return run_command(command, tmp_path / str(host))

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(run, range(2)))
    killed = "was killed by SIGKILL (the kernel does so where memory is short)"
    for one, who in zip(ended, (f"worker 2 on {NAMES[1]}:", "worker 2"), strict=True):
        assert one.code == 1, one.output
        assert not one.orphans
        said = [line for line in one.output.splitlines() if line.startswith("gradsync: ")]
        assert said == [f"gradsync: error: {who} {killed}"], one.output


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(
            ({"transport": transport}, rf"--trainer.num_nodes 2 .* needs --trainer.strategy.transport tcp: {transport}")
            for transport in ("auto", "shared_memory", "ipc", "collective", "naive")
        ),
        ({"transport": "tcp"}, r"needs --trainer.strategy.host ADDRESS, .* and --trainer.strategy.keys DIR"),
    ],
)
def test_what_no_other_host_could_reach_is_refused_by_its_flag(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_trainer(ParameterServerStrategy(**options), 2, num_nodes=2)


def test_every_host_has_a_worker(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    strategy = ParameterServerStrategy(**TCP, keys=tmp_path / "keys", servers=2)
    with pytest.raises(UserError, match=r"needs at least 3 processes on each host \(2 servers and 1 worker\)"):
        make_trainer(strategy, 2, num_nodes=2)
