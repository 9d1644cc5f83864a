"""Reading result files: names, grouping, and what happens to wrong ones."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from result_files import make_result, original_only, write_comparison, write_result

from gradsync.report.caveats import warning_lines
from gradsync.report.comparison import Comparison, group_results
from gradsync.report.methods import method_of, result_filename, result_stem, split_stem, strategy_of, style_of
from gradsync.report.results import load_results


def load(folder: Path) -> Comparison:
    return Comparison.of(folder, load_results(folder))


# Names


@pytest.mark.parametrize(
    ("strategy", "method", "filename"),
    [
        ("ddp", "Baseline DDP (PyTorch)", "results_baseline_ddp.json"),
        ("manual_allreduce", "Manual All-Reduce", "results_all_reduce.json"),
        ("parameter_server", "Parameter Server (PS)", "results_ps.json"),
        ("sharded_server", "Sharded Server", "results_sharded_server.json"),
        ("my_package.MyStrategy", "my_package.MyStrategy", "results_my_package_MyStrategy.json"),
    ],
)
def test_methods_and_files_are_named_as_users_know_them(strategy: str, method: str, filename: str) -> None:
    assert method_of(strategy).name == method
    assert result_filename(result_stem(strategy)) == filename


def test_a_variant_is_named_after_its_options_in_names_that_every_file_system_takes() -> None:
    method = method_of("parameter_server", "wire_dtype=bfloat16+record_schedule=a/../b_r2")
    assert method.name == "Parameter Server (PS), wire_dtype bfloat16, record_schedule a/../b_r2"
    assert method.run_name == "parameter_server-wire-dtype-bfloat16-record-schedule-a-..-b-r2"
    assert split_stem(method.stem).repeat == 1
    assert method_of("ddp", "é").stem.isascii()


def test_variants_of_a_strategy_are_groups_of_their_own_and_no_baseline(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("ddp"))
    variants = ("", "mode=async", "servers=2")
    for variant in variants:
        for repeat in (1, 2):
            result = make_result("parameter_server", variant=variant, repeat=repeat)
            write_result(tmp_path, result, repeat=repeat)
    write_result(tmp_path, make_result("ddp", variant="bucket_cap_mb=5", throughput=820.0))
    asked = ["ddp", "ddp:bucket_cap_mb=5", *(f"parameter_server:{v}".rstrip(":") for v in variants)]
    (tmp_path / "comparison.json").write_text(json.dumps({"strategies": [*asked, "sharded_server:overlap=false"]}))
    comparison = load(tmp_path)
    assert [(group.method, group.repeats) for group in comparison.groups] == [
        ("Baseline DDP (PyTorch)", 1),
        ("Baseline DDP (PyTorch), bucket_cap_mb 5", 1),
        ("Parameter Server (PS)", 2),
        ("Parameter Server (PS), mode async", 2),
        ("Parameter Server (PS), servers 2", 2),
    ]
    assert comparison.speed_up(comparison.groups[1]).median == pytest.approx(2.0)
    assert len({group.style for group in comparison.groups}) == 5
    assert [problem for problem in comparison.problems if "no Sharded Server, overlap false" in problem]


@pytest.mark.parametrize("processes", [None, 1, 16])
@pytest.mark.parametrize("repeat", [1, 2, 12])
def test_a_stem_taken_apart_gives_what_it_was_made_of(processes: int | None, repeat: int) -> None:
    parts = split_stem(result_stem("parameter_server", training_processes=processes, repeat=repeat))
    assert (parts.base, parts.training_processes, parts.repeat) == ("ps", processes, repeat)


def test_suffixes_of_files() -> None:
    assert result_stem("parameter_server", training_processes=4, repeat=2) == "ps_w4_r2"
    assert result_stem("ddp", repeat=3) == "baseline_ddp_r3"


def test_a_strategy_is_recognised_without_its_key() -> None:
    assert strategy_of("Parameter Server (PS)", "whatever") == "parameter_server"
    assert strategy_of("renamed", "all_reduce") == "manual_allreduce"
    assert strategy_of("Mine", "mine") == "mine"


def test_styles_are_stable_and_differ_among_our_strategies() -> None:
    ours = [style_of(name) for name in ("ddp", "manual_allreduce", "parameter_server", "sharded_server")]
    for field in ("color", "marker", "hatch", "dashes"):
        assert len({getattr(style, field) for style in ours}) == len(ours)
    assert style_of("never seen") == style_of("never seen")
    # Written down: Python's hash() of a string would differ from process to process.
    assert style_of("local_sgd").color == "#D55E00"


# Grouping


def test_repeats_and_process_counts_are_grouped_whatever_the_order(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, repeats=3, counts=(2, 4))
    results = load_results(folder).results
    random.Random(1).shuffle(results)
    groups = group_results(results)
    assert [(group.strategy, group.training_processes) for group in groups] == [
        (strategy, count) for strategy in ("ddp", "manual_allreduce", "parameter_server") for count in (2, 4)
    ]
    assert [[result.repeat for result in group.results] for group in groups] == [[1, 2, 3]] * 6
    assert [group.server_processes for group in groups] == [0, 0, 0, 0, 1, 1]


def test_median_and_spread_over_repeats(tmp_path: Path) -> None:
    for repeat, throughput in enumerate((300.0, 100.0, 220.0), start=1):
        result = make_result("ddp")
        result["summary"]["avg_train_throughput"] = throughput
        write_result(tmp_path, result, repeat=repeat)
    (group,) = load(tmp_path).groups
    spread = group.throughput
    assert (spread.median, spread.low, spread.high, spread.count) == (220.0, 100.0, 300.0, 3)
    assert spread.relative == pytest.approx(200 / 220)


def test_a_repeat_without_the_figure_does_not_count(tmp_path: Path) -> None:
    for repeat, accuracy in enumerate((70.0, math.nan, 74.0), start=1):
        result = make_result("ddp")
        result["summary"]["best_val_accuracy"] = accuracy
        for epoch in result["epochs"]:
            epoch["val_accuracy"] = accuracy
        write_result(tmp_path, result, repeat=repeat)
    (group,) = load(tmp_path).groups
    assert (group.best_accuracy.median, group.best_accuracy.count) == (72.0, 2)


# Tolerance


def test_a_good_folder_has_no_problems(tmp_path: Path) -> None:
    loaded = load_results(write_comparison(tmp_path, repeats=2, counts=(2, 4)))
    assert loaded.problems == []
    assert len(loaded.results) == 12


def test_original_keys_alone_are_enough(tmp_path: Path) -> None:
    full, bare = tmp_path / "full", tmp_path / "bare"
    write_comparison(full)
    bare.mkdir()
    for path in full.glob("*.json"):
        (bare / path.name).write_text(json.dumps(original_only(json.loads(path.read_text()))))
    loaded = load_results(bare)
    assert loaded.problems == []
    for ours, theirs in zip(load(full).groups, load(bare).groups, strict=True):
        assert (ours.strategy, ours.processes) == (theirs.strategy, theirs.processes)
        assert ours.throughput == theirs.throughput
        assert math.isnan(theirs.comm("exposed_ms").median)
    server = load(bare).groups[2]
    assert server.comm("total_ms").median == pytest.approx(
        server.comm("push_ms").median + server.comm("pull_ms").median
    )
    assert server.total_is_upper_bound


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no complete JSON"),
        ('{"method": "Manual All-Reduce", "epo', "half-written"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ("[" * 100_000, "no complete JSON"),
        ('{"method": "X", "world_size": 2}', "no usable epochs"),
        ('{"method": "X", "world_size": "two", "epochs": [{}]}', "world_size must be a finite number >= 1, got 'two'"),
        ('{"method": "X", "world_size": 2.5, "epochs": [{}]}', "a whole number, got 2.5"),
        ('{"method": 3, "world_size": 2, "epochs": {}}', "epochs must be a list, got {}"),
    ],
)
def test_an_unusable_file_is_named_and_the_rest_is_read(tmp_path: Path, content: str, named: str) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_all_reduce.json").write_text(content)
    loaded = load_results(tmp_path)
    assert [result.strategy for result in loaded.results] == ["ddp", "parameter_server"]
    (problem,) = loaded.problems
    assert problem.startswith("results_all_reduce.json is left out: ")
    assert named in problem


def test_bytes_that_are_no_text_and_folders_are_named(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_all_reduce.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "results_folder.json").mkdir()
    problems = load_results(tmp_path).problems
    assert [problem.split(" is left out")[0] for problem in problems] == [
        "results_all_reduce.json",
        "results_folder.json",
    ]


@pytest.mark.parametrize("wrong", [None, "fast", True, [], {}, math.nan, math.inf, -1.0, 10**400])
def test_a_wrong_value_is_named_and_its_file_used(tmp_path: Path, wrong: Any) -> None:
    result = make_result("ddp")
    result["epochs"][1]["train_throughput"] = wrong
    write_comparison(tmp_path)
    write_result(tmp_path, result)
    loaded = load_results(tmp_path)
    assert len(loaded.results) == 3
    (problem,) = loaded.problems
    assert problem.startswith("results_baseline_ddp.json: train_throughput must be a finite number >= 0, got ")
    assert problem.endswith(" in epoch 2")
    epochs = loaded.results[1].epochs
    assert [math.isnan(epoch.train_throughput) for epoch in epochs] == [False, True, False]


def test_nan_losses_are_counted_and_located(tmp_path: Path) -> None:
    result = make_result("ddp")
    result["all_losses"][40:43] = [math.nan, None, "x"]
    write_comparison(tmp_path)
    write_result(tmp_path, result)
    (problem,) = load_results(tmp_path).problems
    assert (
        problem == "results_baseline_ddp.json: all_losses: 3 of 150 are not finite numbers; the first, step 41, is nan"
    )


def test_any_single_value_may_be_broken(tmp_path: Path) -> None:
    """Whatever one value in a file becomes, loading neither fails nor loses another file."""

    def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
        if isinstance(value, dict):
            return [prefix, *(p for key, item in value.items() for p in paths(item, (*prefix, key)))]
        if isinstance(value, list):
            return [prefix, *(p for index, item in enumerate(value[:2]) for p in paths(item, (*prefix, index)))]
        return [prefix]

    write_comparison(tmp_path, epochs=1, steps_per_epoch=3)
    original = make_result("parameter_server", epochs=1, steps_per_epoch=3)
    for path in paths(original)[1:]:
        for wrong in ("text", -1, None, [], {"a": {}}, [None], math.nan):
            broken = json.loads(json.dumps(original))
            target = broken
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = wrong
            (tmp_path / "results_ps.json").write_text(json.dumps(broken))
            loaded = load_results(tmp_path)
            assert {"ddp", "manual_allreduce"} <= {result.strategy for result in loaded.results}


# What is not there


def test_a_missing_method_is_named(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_ps.json").unlink()
    assert load_results(tmp_path).problems == ["results_ps.json is not there: no Parameter Server (PS) in this report"]


def test_a_missing_repeat_is_named_with_its_log(tmp_path: Path) -> None:
    write_comparison(tmp_path, repeats=2, counts=(2, 4))
    (tmp_path / "results_ps_w4_r2.json").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ps_w4_r2.log").write_text("")
    (problem,) = load_results(tmp_path).problems
    assert problem.startswith("results_ps_w4_r2.json is not there")
    assert problem.endswith(f"see {tmp_path / 'logs' / 'ps_w4_r2.log'}")


def test_a_failed_run_is_named_with_its_error_and_log(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_ps.json").unlink()
    failure = {
        "strategy": "parameter_server",
        "method": "Parameter Server (PS)",
        "exit_code": 1,
        "error": "worker 2 was killed",
        "log": "logs/ps.log",
    }
    (tmp_path / "failed_ps.json").write_text(json.dumps(failure))
    (problem,) = load_results(tmp_path).problems
    assert problem == (
        "Parameter Server (PS) (ps) failed with exit code 1; it has no result. worker 2 was killed "
        f"(log: {tmp_path / 'logs' / 'ps.log'})"
    )


def test_a_failure_after_some_epochs_keeps_them(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "failed_ps.json").write_text('{"error": "out of memory"}')
    loaded = load_results(tmp_path)
    assert len(loaded.results) == 3
    (problem,) = loaded.problems
    assert "its finished epochs are in this report. out of memory" in problem


def test_a_broken_failure_file_still_tells_that_the_run_failed(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_ps.json").unlink()
    (tmp_path / "failed_ps.json").write_text("{")
    (problem,) = load_results(tmp_path).problems
    assert problem.startswith("ps failed; it has no result. failed_ps.json does not tell why")


def test_lost_workers_are_told(tmp_path: Path) -> None:
    lost = [{"worker": 2, "reason": "was killed by SIGKILL", "pushes": 7, "samples": 56}]
    write_result(tmp_path, make_result("parameter_server") | {"lost_workers": lost})
    (result,) = load_results(tmp_path).results
    assert result.lost_workers == ("worker 2, which was killed by SIGKILL",)
    (told,) = (line for line in warning_lines(load(tmp_path)) if "went on" in line)
    assert told.endswith("its run went on without worker 2, which was killed by SIGKILL.")
