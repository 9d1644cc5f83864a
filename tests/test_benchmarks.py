"""The benchmarks run, say what they promise to say, and leave nothing behind. Never a word about seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from namespaces import two_hosts

from gradsync.comm import ALGORITHMS
from gradsync.strategies import ParameterServerStrategy

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ROWS = {
    "raw_ddp",
    "accelerate",
    "ddp",
    "ddp_keeping_memory",
    "manual_allreduce",
    "sharded_server",
    "sharded_server_sharing",
    "parameter_server",
    "parameter_server_sharing",
    "two_servers",
    "parameter_server_tcp",
    "naive",
    "no_communication",
    "no_communication_keeping_memory",
}
SERVED = {"parameter_server", "parameter_server_sharing", "two_servers", "parameter_server_tcp", "naive"}
ALONE = {"no_communication", "no_communication_keeping_memory"}
TINY = "--arch shufflenet_v2_x0_5 --image-size 32 --batch-size 2 --rounds 1 --steps 2 --warmup 1"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the scripts see it: they run with their own folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments], capture_output=True, text=True, timeout=850
    )


def run_step(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("step.py", *arguments)


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 50  # below the 60 s that they sleep for
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_step_measures_every_row(tmp_path: Path) -> None:
    done = run_step(*TINY.split(), "--json", str(tmp_path / "step.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    assert result.keys() == {"benchmark", "settings", "environment", "rows"}
    assert result["benchmark"] == "step"
    assert result["settings"]["ranks"] == 2
    assert result["settings"]["failed"] == {}
    assert result["rows"].keys() == ROWS
    for name, metrics in result["rows"].items():
        served = {"server_cpu_ms"} if name in SERVED else set()
        ratios = {"ratio_to_ddp", "ratio_to_no_communication"}
        assert metrics.keys() == {"images_per_s", "step_ms", "cpu_ms", "page_faults"} | ratios | served
        for spread in metrics.values():
            assert spread.keys() == {"median", "min", "max"}
            assert 0 <= spread["min"] <= spread["median"] <= spread["max"]
        assert name in done.stdout
    assert result["rows"]["ddp"]["ratio_to_ddp"]["median"] == 1
    equal = next(line for line in done.stdout.splitlines() if line.startswith("Weights"))
    assert all(name in equal for name in ROWS - ALONE - {"ddp"})


@pytest.mark.parametrize("memory", [[], ["--memory", "160"]])
def test_loader_measures_every_row(memory: list[str], tmp_path: Path) -> None:
    sizes = ["--images", "160", "--rounds", "1", "--json", str(tmp_path / "loader.json")]
    done = run_script("loader.py", *sizes, *memory)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert list(rows) == ["classic", "image_folder", "parquet"]
    speeds = {"images_per_s", "ratio_to_classic", "ratio_to_image_folder"}
    wanted = {"mib_at_quarter", "mib_at_end", "mib_most_after", "growth"} if memory else speeds
    assert all(metrics.keys() == wanted for metrics in rows.values())


def test_monitor_measures_what_watching_takes(tmp_path: Path) -> None:
    arguments = [*TINY.split(), "--strategies", "ddp,parameter_server", "--json", str(tmp_path / "monitor.json")]
    done = run_script("monitor.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "monitor.json").read_text())
    assert result["settings"]["failed"] == {}
    hows = ("", "_traced", "_guarded")
    assert list(result["rows"]) == [f"{name}{how}" for name in ("ddp", "parameter_server") for how in hows]
    for metrics in result["rows"].values():
        assert metrics.keys() == {"images_per_s", "step_ms", "observing_ms", "share_pct", "ratio_to_unobserved"}
        assert 0 < metrics["share_pct"]["median"] < 100


def test_exposure_compares_with_the_wall_clock_and_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = ("<!-- exposure table: benchmarks/exposure.py writes it -->", "<!-- end of exposure table -->")
    page.write_text("\n".join(marks))
    rows = "ddp,native,sharded_server,parameter_server"
    tiny = f"--layers 2 --rounds 1 --steps 2 --warmup 1 --rows {rows} --markdown {page}"
    done = run_script("exposure.py", *tiny.split(), "--json", str(tmp_path / "exposure.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "exposure.json").read_text())
    assert result["settings"]["failed"] == {}
    assert list(result["rows"]) == rows.split(",")
    assert all(metrics["exposed_ms"]["median"] > 0 for metrics in result["rows"].values())
    assert all(f"| `{name}` |" in page.read_text() for name in result["rows"])


def test_sync_measures_every_algorithm_and_checks_its_sum(tmp_path: Path) -> None:
    tiny = "--ranks 3 --arch shufflenet_v2_x0_5 --rounds 1 --sums 1"
    done = run_script("sync.py", *tiny.split(), "--json", str(tmp_path / "sync.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "sync.json").read_text())
    assert result["settings"]["failed"] == {}
    assert result["rows"].keys() == {"ddp", "flat", *ALGORITHMS}
    for metrics in result["rows"].values():
        assert metrics.keys() == {"wall_ms", "cpu_ms", "wall_ratio_to_ddp", "cpu_ratio_to_ddp"}
    assert result["rows"]["ddp"]["cpu_ratio_to_ddp"]["median"] == 1


def test_server_measures_every_transport_and_checks_the_parameters(tmp_path: Path) -> None:
    tiny = "--arch shufflenet_v2_x0_5 --rounds 1 --steps 1"
    done = run_script("server.py", *tiny.split(), "--json", str(tmp_path / "server.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "server.json").read_text())
    assert result["settings"]["failed"] == {}
    assert result["rows"].keys() == {"raw_tcp", "tcp", "ipc", "shared_memory", "naive"}
    ratios = {"wall_ratio_to_raw_tcp", "cpu_ratio_to_raw_tcp"}
    for metrics in result["rows"].values():
        assert metrics.keys() == {"wall_ms", "cpu_ms", "worker_cpu_ms", "server_cpu_ms"} | ratios
    assert result["rows"]["raw_tcp"]["wall_ratio_to_raw_tcp"]["median"] == 1
    assert "a local optimizer, to the bit: raw_tcp, tcp, ipc, shared_memory, naive." in done.stdout


def test_two_hosts_compares_strategies_over_a_link(tmp_path: Path) -> None:
    with two_hosts():
        pass  # or it is skipped
    tiny = "--mbit 1000 --mib 0.1 --rounds 1 --steps 2 --warmup 1 --strategies ddp,parameter_server"
    done = run_script("two_hosts.py", *tiny.split(), "--json", str(tmp_path / "two_hosts.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "two_hosts.json").read_text())["rows"]
    assert {name: row["trained_in"]["median"] for name, row in rows.items()} == {"ddp": 4, "parameter_server": 3}
    assert rows["parameter_server"]["ratio_to_ddp"]["median"] > 0


def test_a_server_that_gives_other_parameters_has_no_result(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import server_rows

    workload = server_rows.Workload.of("shufflenet_v2_x0_5", 1, 60)
    right = server_rows.optimizer_of
    ours = os.getpid()

    def wrong_on_the_server(parameters: list[Any]) -> Any:
        optimizer = right(parameters)
        if os.environ["RANK"] == "0" and os.getpid() != ours:
            optimizer.param_groups[0]["momentum"] = 0.8
        return optimizer

    monkeypatch.setattr(server_rows, "optimizer_of", wrong_on_the_server)
    with pytest.raises(harness.RowFailed, match="the parameters are not those of a local optimizer"):
        harness.run_processes(lambda process: server_rows.ROWS["raw_tcp"].run(process, workload), 2, 60)


def test_server_uses_the_default_part_sizes_of_the_strategy(harness: Any) -> None:
    import server_rows

    for transport in ("tcp", "ipc", "shared_memory"):
        strategy = ParameterServerStrategy(
            transport, parallel_devices=[torch.device("cpu")] * 2, cluster_environment=LightningEnvironment()
        )
        assert server_rows.ROWS[transport].part_mib == strategy._part_mib


STALENESS_TINY = "--arch shufflenet_v2_x0_5 --slowness 2 --batch-size 2"


def _page_of(tmp_path: Path, name: str) -> Path:
    page = tmp_path / "page.md"
    begin, end = f"<!-- staleness {name} table: benchmarks/staleness.py writes it -->", f"<!-- end of {name} table -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return page


def test_staleness_speed_counts_updates_and_samples(tmp_path: Path) -> None:
    page = _page_of(tmp_path, "speed")
    tiny = f"speed {STALENESS_TINY} --rounds 1 --steps 12 --warmup 1"
    done = run_script("staleness.py", *tiny.split(), "--json", str(tmp_path / "s.json"), "--markdown", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert rows.keys() == {"sync", "bounded", "async"}
    for name, metrics in rows.items():
        median = {metric: spread["median"] for metric, spread in metrics.items()}
        per_update = 2 * 2 if name == "sync" else 2
        assert median["samples_per_s"] == pytest.approx(per_update * median["updates_per_s"])
        assert median.keys() >= {"staleness", "updates_ratio_to_sync", "samples_ratio_to_sync"}
    assert rows["sync"]["staleness"]["max"] == 0
    text = page.read_text()
    assert "old" not in text
    assert all(f"| `{name}` |" in text for name in rows)
    assert "An update of `sync` is a step by all workers' gradients" in text


def test_staleness_accuracy_trains_every_mode_with_every_seed(tmp_path: Path) -> None:
    page = _page_of(tmp_path, "accuracy")
    tiny = f"accuracy {STALENESS_TINY} --seeds 2 --epochs 1 --limit-batches 3"
    done = run_script("staleness.py", *tiny.split(), "--json", str(tmp_path / "a.json"), "--markdown", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["rows"].keys() == {"sync", "bounded", "async"}
    assert result["settings"]["lr_factor"] == 0.5
    assert all(0 <= row["top1_pct"]["min"] <= row["top1_pct"]["max"] <= 100 for row in result["rows"].values())
    text = page.read_text()
    assert text.startswith("before\n<!-- staleness accuracy table")
    assert all(f"| `{name}` |" in text for name in result["rows"])
    assert "in `bounded` and `async` times 0.5" in text


def test_hooks_trains_with_each_and_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- hooks table: benchmarks/hooks.py writes it -->", "<!-- end of hooks table -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    tiny = "--arch shufflenet_v2_x0_5 --epochs 1 --limit-batches 12"
    files = ["--markdown", str(page), "--json", str(tmp_path / "hooks.json")]
    done = run_script("hooks.py", *tiny.split(), *files)
    assert done.returncode == 0, done.stdout + done.stderr
    megabytes = {
        name: r["mb_per_step"] for name, r in json.loads((tmp_path / "hooks.json").read_text())["rows"].items()
    }
    assert megabytes.keys() == {"none", "bf16", "powersgd, rank 4", "int8", "top_k, 1 %"}
    assert megabytes["bf16"] == pytest.approx(megabytes["none"] / 2)
    assert megabytes["int8"] == pytest.approx(megabytes["none"] / 4, rel=0.05)  # scales come on top
    assert megabytes["top_k, 1 %"] == pytest.approx(megabytes["none"] / 50, rel=0.05)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| hook ")
    assert text.endswith(f"{end}\nafter\n")
    assert all(f"| {name} |" in text for name in megabytes)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--rows ddp,foo", "argument --rows: must be some of raw_ddp,accelerate,ddp"),
        ("--ranks 1", "argument --ranks: must be >= 2"),
        ("--steps 0", "argument --steps: must be a whole number >= 1, got '0'"),
    ],
)
def test_mistakes_are_named(arguments: str, text: str) -> None:
    done = run_step(*arguments.split())
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_processes_return_their_results_in_order(harness: Any) -> None:
    results = harness.run_processes(lambda process: [process.index, len(process.earlier_pids)], 3, 30)
    assert results == [[0, 0], [1, 1], [2, 2]]


def test_a_failing_process_ends_all_and_is_quoted(harness: Any, tmp_path: Path) -> None:
    def work(process: Any) -> None:
        (tmp_path / f"{process.index}.part").write_text(str(os.getpid()))
        (tmp_path / f"{process.index}.part").rename(tmp_path / str(process.index))
        if process.index == 1:
            while not (tmp_path / "0").exists():
                time.sleep(0.01)
            raise ArithmeticError("the true reason")
        time.sleep(60)

    with pytest.raises(harness.RowFailed, match=r"process 1 of 2 ended with exit code 1(.|\n)*the true reason"):
        harness.run_processes(work, 2, 30)
    assert all(not psutil.pid_exists(int(path.read_text())) for path in tmp_path.iterdir())


def test_a_process_that_does_not_end_is_named(harness: Any) -> None:
    processes = harness.Processes(lambda process: time.sleep(60 * process.index), 2)
    try:
        while 0 in processes._running:
            processes.one_has_failed()
            time.sleep(0.01)
        with pytest.raises(harness.RowFailed, match=r"process\(es\) 1 did not end within 0.1 s"):
            processes.results(0.1)
    finally:
        processes.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_outlives_the_script(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
        import os, pathlib, time, harness
        def work(process):
            part = pathlib.Path({str(tmp_path)!r}, f"{{process.index}}.part")
            part.write_text(str(os.getpid()))
            part.rename(part.with_suffix(".pid"))
            time.sleep(60)
        harness.run_processes(work, 2, 60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=BENCHMARKS,
        stderr=subprocess.DEVNULL,
        # As in a terminal: what a suite in the background of a shell starts ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as script:
        while len(list(tmp_path.glob("*.pid"))) < 2:
            assert script.poll() is None
            time.sleep(0.02)
        script.send_signal(number)
    assert all(wait_until_gone(int(path.read_text())) for path in tmp_path.glob("*.pid"))


def test_a_failed_row_does_not_lose_the_others(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"ddp": iter([10.0, 20.0, 40.0]), "ours": iter([11.0, 24.0, 40.0])}

    def broken() -> dict[str, float]:
        raise harness.RowFailed("it is broken\nand this is why")

    rows = {name: lambda speed=speed: {"images_per_s": next(speed)} for name, speed in speeds.items()}
    rounds = harness.Rounds({**rows, "broken": broken}, "images_per_s")
    rounds.run(3)
    assert rounds.failed == {"broken": "it is broken\nand this is why"}
    summary = rounds.summary(("ddp", "broken"), "images_per_s")
    assert summary.keys() == {"ddp", "ours"}
    assert summary["ours"]["images_per_s"] == {"median": 24.0, "min": 11.0, "max": 40.0}
    assert summary["ours"]["ratio_to_ddp"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.2})
    assert "ratio_to_broken" not in summary["ours"]
    assert capsys.readouterr().out.count("FAILED: it is broken") == 1


# -- hostile messages ----------------------------------------------------------------------------------------------


def test_hostile_messages_change_nothing_and_every_kind_of_them_is_sent(tmp_path: Path) -> None:
    done = run_script("fuzz.py", "--frames", "3000", "--socket-share", "0.2", "--json", str(tmp_path / "fuzz.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,000 hostile messages" in done.stdout
    assert "all is well" in done.stdout
    rows = json.loads((tmp_path / "fuzz.json").read_text())["rows"]
    assert len(rows) == 6
    assert sum(row["messages"] for row in rows.values()) == 3000
    for name, row in rows.items():
        assert row["outcomes"]["refused"] > row["messages"] / 4, name
        assert row["faults"] == {}, name
        assert all(row["by_mutation"].values()), name
    assert all(row["outcomes"]["raw"] == 20 for name, row in rows.items() if "socket" in name)


def test_a_server_that_takes_what_it_should_refuse_is_found(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer that cannot find anything would say the same of every server."""
    import random

    import fuzz
    from fuzz_frames import record

    from gradsync.comm.server.aggregator import Aggregator

    add = Aggregator.add

    def careless(self: Aggregator, worker: int, bucket_index: int, part: int, payload: Any) -> None:
        with torch.no_grad():
            self.layout.buckets[0].parameters()[0].view(-1)[0] += 1
        add(self, worker, bucket_index, part, payload)

    monkeypatch.setattr(Aggregator, "add", careless)
    row = fuzz.attack_object("sync", record("sync"), 600, random.Random(0), lambda done: None)
    assert "parameters changed by what was refused" in row.misses()
