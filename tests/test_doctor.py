"""``gradsync doctor``: a fit machine passes, each fault is really made and found, and no rank outlives the command."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, gradsync, run_command
from distributed import free_port
from image_trees import write_tree
from jsonschema import Draft202012Validator

from gradsync.doctor_output import DOCTOR_SCHEMA
from gradsync.health import Check, PlannedRun, ranks
from gradsync.health.check import or_failure
from gradsync.health.communication import communication_checks
from gradsync.health.disks import check_data, check_output
from gradsync.health.gpus import Gpus, find_gpus, gpu_checks
from gradsync.health.machine import check_cores, check_kernel, check_memory, cpu_quota
from gradsync.health.measurements import measure
from gradsync.health.network import check_interfaces, check_meeting_place
from gradsync.health.ranks import Outcome, start_here
from gradsync.health.shared_memory import check_leftovers, check_shm
from gradsync.health.versions import check_versions

SCHEMA = json.loads(DOCTOR_SCHEMA.read_text())
NAMES: list[str] = SCHEMA["properties"]["checks"]["items"]["properties"]["name"]["enum"]
COMMAND = [sys.executable, "-m", "gradsync", "doctor", "--accelerator", "cpu", "--devices", "2"]
IS_ROOT = os.geteuid() == 0


def planned(tmp_path: Path, **changes: Any) -> PlannedRun:
    options = {"devices": 2, "accelerator": "cpu", "output": tmp_path, "data_dir": None, "timeout_s": 30.0}
    return PlannedRun(**{**options, **changes})


def marks(output: str) -> dict[str, str]:
    """The mark of each check by its name, from what the command printed."""
    return {name: mark for mark, name in re.findall(r"^(ok|warn|FAIL) {2,4}(\S+(?: \S+)?) {2,}", output, re.MULTILINE)}


def assert_fails(check: Check, *texts: str) -> None:
    assert check.mark == "FAIL", check
    assert check.remedy
    assert not [text for text in texts if text not in f"{check.found} {check.remedy}"]


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("normal")
    ended = run_command([*COMMAND, "--json", "health.json"], folder)
    return ended, json.loads((folder / "health.json").read_text()), folder


def test_a_fit_machine_passes_and_every_check_appears(normal: tuple[Ended, dict[str, Any], Path]) -> None:
    ended, document, folder = normal
    assert ended.code == 0, ended.output
    assert not ended.orphans
    seen = marks(ended.output)
    only_with_gpus = {"topology", "NCCL"}
    assert seen.keys() - only_with_gpus == set(NAMES) - only_with_gpus
    assert "FAIL" not in seen.values()
    assert "could not be looked at" not in ended.output
    assert seen == {check["name"]: check["mark"] for check in document["checks"]}
    assert [path.name for path in folder.iterdir()] == ["health.json"], "it leaves nothing in the folder of runs"


def test_the_output_reads_well_in_a_pipe_and_ends_with_what_to_do(normal: tuple[Ended, dict[str, Any], Path]) -> None:
    output = normal[0].output
    *lines, summary, command = output.splitlines()
    assert "\x1b" not in output
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    total, *parts = map(int, re.findall(r"\d+", summary))
    assert re.fullmatch(r"\d+ checks: \d+ ok, \d+ to look at, \d+ FAIL", summary)
    assert total == sum(parts) == len(marks(output))
    assert command.startswith("Next: gradsync fit --trainer.accelerator cpu --trainer.devices 2 ")


def test_the_json_keeps_to_its_schema(normal: tuple[Ended, dict[str, Any], Path]) -> None:
    document = normal[1]
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(document)
    counts = {mark: sum(check["mark"] == mark for check in document["checks"]) for mark in ("ok", "warn", "FAIL")}
    assert counts == {"ok": document["ok"], "warn": document["warn"], "FAIL": document["fail"]}
    broken = {**document, "checks": [{**document["checks"][0], "remedy": "none needed", "mark": "ok"}]}
    assert list(Draft202012Validator(SCHEMA).iter_errors(broken))


def test_what_ranks_measured_makes_sense(normal: tuple[Ended, dict[str, Any], Path]) -> None:
    values = {check["name"]: check["values"] for check in normal[1]["checks"]}
    assert values["all-reduce"]["mib_per_s"] > 0
    assert list(values["pairs"]) == ["0-1"]
    # The time of ResNet50's gradients is that of their bytes at the speed of the trial.
    expected_ms = 1e3 * 25_557_032 * 4 / 2**20 / values["all-reduce"]["mib_per_s"]
    assert values["all-reduce"]["resnet50_gradients_ms"] == pytest.approx(expected_ms)


def test_a_fault_ends_with_code_1_and_the_same_command_again(tmp_path: Path) -> None:
    """An interface that is not there, as the backend itself finds it too."""
    ended = run_command(["env", "GLOO_SOCKET_IFNAME=nosuch0", *COMMAND], tmp_path)
    seen = marks(ended.output)
    assert ended.code == 1, ended.output
    assert (seen["interfaces"], seen["ranks"]) == ("FAIL", "FAIL")
    assert ended.output.count("nosuch0") >= 2
    assert "all-reduce" not in seen
    assert ended.output.splitlines()[-1].endswith("gradsync doctor --accelerator cpu --devices 2")
    assert not ended.orphans


def test_a_port_that_is_taken_and_few_open_files(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from gradsync.cli import main; main(sys.argv[1:])"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["env", f"MASTER_PORT={port}", sys.executable, "-c", script, *COMMAND[3:], "--devices", "1"]
        ended = run_command(command, tmp_path)
    seen = marks(ended.output)
    assert ended.code == 1, ended.output
    assert {name for name, mark in seen.items() if mark == "FAIL"} == {"MASTER_PORT", "open files"}
    assert f"port {port} on 127.0.0.1: Address already in use" in ended.output
    assert "100 per process (hard limit 100)" in ended.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs, so asking for them is right")
def test_gpus_that_are_not_there(tmp_path: Path) -> None:
    ended = gradsync("doctor", "--accelerator", "gpu", "--devices", "1", cwd=tmp_path)
    assert ended.code == 1, ended.output
    assert marks(ended.output)["GPUs"] == "FAIL"
    assert "ranks" not in marks(ended.output)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    ended = run_command([*COMMAND[:-1], "1", "--json", "/proc/nowhere.json"], tmp_path)
    assert ended.code == 1
    assert "gradsync: error: --json /proc/nowhere.json cannot be written" in ended.output
    assert "Traceback" not in ended.output


def test_wrong_usage(tmp_path: Path) -> None:
    ended = gradsync("doctor", "--devices", "0", cwd=tmp_path)
    assert (ended.code, "must be a whole number >= 1" in ended.output) == (2, True)


# -- ranks ---------------------------------------------------------------------------------------------------


def trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misbehave: Any, timeout_s: float = 2.0
) -> tuple[str, Outcome]:
    """What is said of ranks that call ``misbehave(rank, step)`` before each step; they are forked from here."""

    def measured(place: Any, connect: Any, arrive: Any) -> Any:
        def arriving(step: str) -> None:
            misbehave(place.rank, step)
            arrive(step)

        return measure(place, connect, arriving)

    monkeypatch.setattr(ranks, "measure", measured)
    run = planned(tmp_path, timeout_s=timeout_s)
    outcome = start_here(run)
    checks = communication_checks(run, outcome, "here")
    assert [(check.name, check.mark) for check in checks] == [("ranks", "FAIL")]
    return checks[0].found, outcome


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", ["forming the group", "all-reduces of 64 MiB"])
def test_a_rank_that_is_stopped_is_named(rank: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(its_rank: int, its_step: str) -> None:
        if (its_rank, its_step) == (rank, step):
            os.kill(os.getpid(), signal.SIGSTOP)

    found, outcome = trial(tmp_path, monkeypatch, stop)
    assert f"waiting for rank {rank} " in found
    assert "(stopped by a signal)" in found
    assert outcome.missing() == [rank]


def test_a_rank_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(rank: int, step: str) -> None:
        if (rank, step) == (1, "a barrier"):
            time.sleep(600)

    found, outcome = trial(tmp_path, monkeypatch, hang)
    assert found == "gloo did not get on within 2 s, waiting for rank 1 at forming the group"
    assert outcome.missing() == [1]


def test_a_rank_that_is_killed_or_fails_is_named_and_not_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(rank: int, step: str) -> None:
        if (rank, step) == (1, "all-reduces of 64 MiB"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert trial(tmp_path, monkeypatch, die, 20.0)[0].endswith("was killed by SIGKILL")

    def fail(rank: int, step: str) -> None:
        if (rank, step) == (0, "forming the group"):
            raise RuntimeError("no such device")

    assert trial(tmp_path, monkeypatch, fail, 20.0)[0] == "rank 0, at reaching the store: no such device"


def test_ranks_listen_on_loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")

    def measured(place: Any, connect: Any, arrive: Any) -> Any:
        result = measure(place, connect, arrive)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo", "on some hosts the host's name leads to loopback anyhow"
        return {**result, "listens": listening()}

    monkeypatch.setattr(ranks, "measure", measured)
    outcome = start_here(planned(tmp_path))
    addresses = {address for result in outcome.results.values() for address in result["listens"]}
    assert addresses == {"7F000001"}, "in hexadecimal, as /proc/net/tcp has them"


def listening() -> list[str]:
    """Local addresses of the sockets on which this process listens."""
    mine = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one by which the folder was listed
            mine.add(os.readlink(path))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [
        socket.ntohl(int(row[1].partition(":")[0][-8:], 16)).to_bytes(4).hex().upper()
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in mine
    ]


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "from gradsync.health import ranks\n"
        "def measure(place, connect, arrive):\n"
        "    pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
        "ranks.measure = measure\n"
        "from gradsync.cli import main; main(['doctor', '--accelerator', 'cpu', '--devices', '2'])"
    )
    started = tmp_path / "started"
    started.mkdir()
    command = [sys.executable, "-c", script, str(started)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(started.iterdir())) == 2, 240)
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path("/proc", path.name).exists() for path in started.iterdir()), 60)


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


@pytest.mark.parametrize("fork", [1, 4], ids=["asking for GPUs", "rank 0"])
def test_ctrl_c_at_a_fork_is_not_lost(fork: int, tmp_path: Path) -> None:
    """Python drops a KeyboardInterrupt that is raised in the functions it calls at a fork."""
    script = (
        "import itertools, os, signal\n"
        "from gradsync.cli import main; forks = itertools.count(1)\n"
        f"os.register_at_fork(before=lambda: next(forks) == {fork} and os.kill(os.getpid(), signal.SIGINT))\n"
        "main(['doctor', '--accelerator', 'cpu', '--devices', '2'])"
    )
    ended = run_command([sys.executable, "-c", script], tmp_path)
    assert ended.code == 130, ended.output
    assert "ranks formed" not in ended.output
    assert not ended.orphans
    assert "Traceback" not in ended.output


def test_ctrl_c_ends_the_ranks_too(tmp_path: Path) -> None:
    ended = run_command(COMMAND, tmp_path, interrupt_at="  GPUs  ")
    assert ended.code == 130, ended.output
    assert not ended.orphans
    assert "Traceback" not in ended.output


def test_torchruns_ranks_are_used(tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    options = ["--accelerator", "cpu", "--json", "health.json"]
    ended = run_command([torchrun, "--nproc_per_node=2", "-m", "gradsync", "doctor", *options], tmp_path)
    assert ended.code == 0, ended.output
    assert not ended.orphans
    assert ended.output.count("checks: ") == 1, "only rank 0 prints"
    checks = {check["name"]: check for check in json.loads((tmp_path / "health.json").read_text())["checks"]}
    assert "2 ranks formed a gloo group under the launcher" in checks["ranks"]["found"]
    assert list(checks["pairs"]["values"]) == ["0-1"]


def test_one_of_torchruns_ranks_that_hangs_is_named(tmp_path: Path) -> None:
    """Rank 0 knows of it by the store only."""
    (tmp_path / "hanging.py").write_text(
        "import os, pathlib, time\n"
        "from gradsync.health import ranks\n"
        "from gradsync.cli import main\n"
        "pathlib.Path(os.environ['RANK']).touch()\n"  # loaded: it may take one of them much longer
        "while not all(pathlib.Path(rank).exists() for rank in '01'):\n"
        "    time.sleep(0.01)\n"
        "measured = ranks.measure\n"
        "def measure(place, connect, arrive):\n"
        "    def arriving(step):\n"
        "        if place.rank == 1 and step == 'all-reduces of 1 float':\n"
        "            time.sleep(600)\n"
        "        arrive(step)\n"
        "    return measured(place, connect, arriving)\n"
        "ranks.measure = measure\n"
        "main(['doctor', '--accelerator', 'cpu', '--timeout', '3'])"
    )
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    ended = run_command([torchrun, "--nproc_per_node=2", "hanging.py"], tmp_path)
    assert ended.code == 1, ended.output
    assert "waiting for rank 1 at a barrier" in re.sub(r"\s+", " ", ended.output)
    assert not ended.orphans


def test_a_rank_that_the_launcher_did_not_start_is_named(tmp_path: Path) -> None:
    place = ["RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    ended = run_command(["env", *place, *COMMAND, "--timeout", "2"], tmp_path)
    assert ended.code == 1, ended.output
    assert "waiting for rank 1 at starting" in re.sub(r"\s+", " ", ended.output)
    assert not ended.orphans


# -- GPUs ----------------------------------------------------------------------------------------------------


def gpus_of(*free_gib: int, peers: bool = True) -> Gpus:
    """As a machine with so many would have them. None of those that run this has."""
    devices = [{"name": "GPU", "total_bytes": 80 * 2**30, "free_bytes": free * 2**30} for free in free_gib]
    numbers = range(len(devices))
    return Gpus(devices, [[peers or i == j for j in numbers] for i in numbers], "2.27.3", "570.1")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (gpus_of(79, 79), {"GPUs": "ok", "topology": "ok", "NCCL": "ok"}),
        (gpus_of(79, 79, peers=False), {"GPUs": "ok", "topology": "warn", "NCCL": "ok"}),
        (gpus_of(79, 20), {"GPUs": "warn", "topology": "ok", "NCCL": "ok"}),
        (gpus_of(79), {"GPUs": "FAIL", "NCCL": "ok"}),
        (Gpus(), {"GPUs": "FAIL"}),
        (Gpus(driver="570.1"), {"GPUs": "FAIL"}),
        (Gpus(problem="no answer"), {"GPUs": "FAIL"}),
    ],
    ids=["fit", "apart", "in use", "too few", "none", "driver only", "no answer"],
)
def test_what_is_said_of_gpus(gpus: Gpus, expected: dict[str, str], tmp_path: Path) -> None:
    checks = gpu_checks(planned(tmp_path, accelerator="gpu"), gpus)
    assert {check.name: check.mark for check in checks} == expected


def test_a_driver_that_hangs_or_crashes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsync.health.gpus._PATIENCE_S", 1.0)
    monkeypatch.setattr("gradsync.health.gpus._ask", lambda: time.sleep(600))
    assert find_gpus().problem == "no answer within 1 s"
    monkeypatch.setattr("gradsync.health.gpus._PATIENCE_S", 60.0)
    monkeypatch.setattr("gradsync.health.gpus._ask", lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert find_gpus().problem == "it was killed, or crashed"


# -- network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("MASTER_PORT", "http", "'http' is no port"),
        ("MASTER_PORT", "70000", "'70000' is no port"),
        ("MASTER_ADDR", "nowhere.invalid", "'nowhere.invalid' leads nowhere"),
    ],
)
def test_a_meeting_place_that_makes_no_sense(
    variable: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert_fails(check_meeting_place(None), text, f"unset {variable}")


def test_a_port_that_is_free_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert check_meeting_place(None).mark == "ok"


@pytest.mark.parametrize(
    ("value", "mark"),
    [("lo", "ok"), ("=lo", "ok"), ("^docker", "ok"), ("nosuch,l", "ok"), ("=l", "FAIL"), ("x", "FAIL")],
)
def test_how_nccl_reads_names_of_interfaces(
    value: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert check_interfaces(planned(tmp_path, accelerator="gpu")).mark == mark


def test_without_loopback_and_with_a_host_name_that_leads_nowhere(tmp_path: Path) -> None:
    """In namespaces of its own: there loopback is down, and the host's name can be changed."""
    inside = [
        "unshare",
        "--net",
        "--uts",
        "bash",
        "-c",
        'hostname gradsync-nowhere; exec env -u GLOO_SOCKET_IFNAME "$@"',
    ]
    if not IS_ROOT or subprocess.run([*inside, "-", "true"], capture_output=True).returncode != 0:
        pytest.skip("namespaces can be made by root only, and not in every container")
    ended = run_command([*inside, "-", *COMMAND, "--timeout", "5"], tmp_path)
    seen = marks(ended.output)
    assert ended.code == 1, ended.output
    assert (seen["loopback"], seen["host name"], seen["ranks"]) == ("FAIL", "warn", "FAIL")
    assert "gradsync-nowhere" in ended.output


# -- disks and memory ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not IS_ROOT or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems can be mounted by root only, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    assert_fails(check_output(planned(small_disk)), "No space left on device", "--output DIR", "--run_dir DIR")
    assert not list(small_disk.iterdir())


def test_a_disk_that_cannot_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_fails(check_output(planned(small_disk / "runs")), "Read-only file system")


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_fails(check_output(planned(tmp_path / "file")), "cannot be written")


def test_little_room_for_the_loaders(small_disk: Path, tmp_path: Path) -> None:
    assert check_shm(planned(tmp_path), small_disk).mark == "ok"  # the bundled images need no workers
    assert_fails(
        check_shm(planned(tmp_path, data_dir="x"), small_disk), "1 MiB", "--data.num_workers 0", "--shm-size 1g"
    )


def test_leftovers_of_the_dead_only(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [
        f"torch_{gone.pid}_1_0",
        f"gradsync-{gone.pid}-server-x",
        f"torch_{os.getpid()}_1_0",
        "torch_notes",
        "other",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / names[1] / "file").write_bytes(bytes(3 * 2**20))
    check = check_leftovers([tmp_path])
    assert check.mark == "warn"
    assert check.values["paths"] == sorted(str(tmp_path / name) for name in names[:2])
    assert "3 MiB" in check.found
    subprocess.run(["bash", "-c", str(check.remedy).split(", unless")[0]], check=True)  # the remedy does it
    assert check_leftovers([tmp_path]).mark == "ok"
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_images(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 10, 2)
    good = check_data(planned(tmp_path, data_dir=str(tree)))
    assert good.mark == "ok", good
    assert "image folder" in good.found
    broken = next((tree / "train").glob("*/*"))
    broken.write_bytes(broken.read_bytes()[:50])
    check = check_data(planned(tmp_path, data_dir=str(tree)))
    assert check.mark == "warn"
    assert check.values["undecodable"] == [str(broken)]
    assert "--data.bad_samples skip" in str(check.remedy)
    assert_fails(check_data(planned(tmp_path, data_dir=str(tmp_path / "no"))), "no such folder", "--data-dir DIR")


def test_storage_that_hangs(tmp_path: Path) -> None:
    """A pipe in place of an image: whoever opens it waits, as for a file server that has gone."""
    tree = write_tree(tmp_path / "tree", 10, 2)
    image = next((tree / "train").glob("*/*"))
    image.unlink()
    os.mkfifo(image)
    check = or_failure("data", lambda: check_data(planned(tmp_path, data_dir=str(tree))), 2.0)
    assert_fails(check, "no answer within 2 s", "--timeout SECONDS")


def test_devices_against_those_of_the_launcher(tmp_path: Path) -> None:
    place = ["RANK=0", "WORLD_SIZE=3", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    ended = run_command(["env", *place, *COMMAND], tmp_path)
    assert ended.code == 1
    assert "the launcher started 3 processes here, but --devices says 2: leave the flag out" in ended.output


def test_too_little_memory(tmp_path: Path) -> None:
    check = check_memory(planned(tmp_path, devices=100_000))
    assert_fails(check, "GiB available", "--trainer.devices")


# -- the rest of the machine ---------------------------------------------------------------------------------


def test_versions() -> None:
    assert check_versions().mark == "ok"
    check = check_versions(["torch>=99", "no-such-package>=1", "rich>=1", "s3fs>=99; extra == 's3'"])
    assert_fails(check, "CVE-2026-24747", version("torch"), "none is installed", "pip install 'torch>=99'")
    assert "rich" not in check.found
    assert "s3fs" not in check.found


def test_threads_and_ranks_against_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    assert "export OMP_NUM_THREADS=" in str(check_cores(planned(tmp_path, devices=1)).remedy)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check_cores(planned(tmp_path, devices=1)).mark == "ok"
    assert "--trainer.devices" in str(check_cores(planned(tmp_path, devices=cores + 1)).remedy)


def test_a_quota_of_cores(tmp_path: Path) -> None:
    """In a control group of its own, of either kind."""
    before = cpu_quota()
    is_new_kind = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root, name, limit = ("", "cpu.max", "50000 100000") if is_new_kind else ("cpu", "cpu.cfs_quota_us", "50000")
    group = Path("/sys/fs/cgroup", root, f"gradsync-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (group / name).write_text(limit)
    except OSError as error:
        group.rmdir()
        pytest.skip(f"no control group can have a limit here: {error}")
    script = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); from gradsync.health.machine import *\n"
    script += "print(cpu_quota(), num_cores(), check_container())"
    try:
        command = ["env", "-u", "OMP_NUM_THREADS", sys.executable, "-c", script, str(group / "cgroup.procs")]
        ended = run_command(command, tmp_path)
    finally:
        group.rmdir()
    assert ended.output.startswith("0.5 1 Check(name='container', mark='warn'"), ended.output
    assert cpu_quota() == before


def test_a_call_that_the_container_forbids(tmp_path: Path) -> None:
    """pidfd_open, by a seccomp filter as container engines set one."""
    assert check_kernel().mark == "ok"
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += "from test_doctor import forbid; from gradsync.health.machine import check_kernel\n"
    script += "forbid(434); print(check_kernel())"
    ended = run_command([sys.executable, "-c", script], tmp_path)
    assert ended.code == 0, ended.output
    assert "mark='FAIL', found='pidfd_open cannot be called here'" in ended.output


def forbid(number: int) -> None:
    """Let a system call fail with EPERM in this process from now on."""

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    load, equal, answer = 0x20, 0x15, 0x06  # of the number; jump if it is that one; and what to do then
    lines = [(load, 0, 0, 0), (equal, 0, 1, number), (answer, 0, 0, 0x00050001), (answer, 0, 0, 0x7FFF0000)]
    code = (Instruction * len(lines))(*(Instruction(*line) for line in lines))
    program = Program(len(lines), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(program)) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
