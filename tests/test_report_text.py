"""The text report: every sentence follows from the numbers in the files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from result_files import make_losses, make_result, original_only, write_comparison, write_result

from gradsync.report.comparison import Comparison
from gradsync.report.curves import running_mean, window_of
from gradsync.report.results import load_results
from gradsync.report.text import report_text

SECTIONS = ("In short", "Throughput", "Convergence", "Communication", "Scaling", "Environment", "Warnings")


def report(folder: Path) -> dict[str, str]:
    """The text of each section, without its line breaks."""
    text = report_text(Comparison.of(folder, load_results(folder)))
    sections = {}
    for title in SECTIONS:
        body = text.split(f"\n{title}\n{'-' * len(title)}\n")[1]
        sections[title] = " ".join(body.split("\n\n")[0].split())
    return sections


def pair(folder: Path, ours: dict[str, Any], theirs: dict[str, Any] | None = None) -> dict[str, str]:
    """The report on a method against the baseline."""
    write_result(folder, theirs or make_result("ddp"))
    write_result(folder, ours)
    return report(folder)


def test_every_section_changes_with_its_numbers(tmp_path: Path) -> None:
    """Two comparisons that differ in everything share no sentence but those on equal facts."""
    first = report(write_comparison(tmp_path / "a"))
    others = {"epochs": 4, "steps_per_epoch": 30, "loss_seed": 3, "batch_size": 8, "warmup_steps": 7}
    others |= {"demo_data": False, "data": "x", "start_time": "2025-04-01 10:00:00", "environment": {"torch": "9"}}
    second = report(write_comparison(tmp_path / "b", repeats=2, counts=(2, 4), **others))
    for title in SECTIONS:
        sentences = [set(part[title].split("- ")) - {""} for part in (first, second)]
        assert not sentences[0] & sentences[1], title


# In short


def rates(folder: Path, **numbers: tuple[float, ...]) -> dict[str, str]:
    """The report on strategies with a throughput for each repeat."""
    for strategy, repeats in numbers.items():
        for repeat, rate in enumerate(repeats, start=1):
            result = make_result(strategy)
            result["summary"]["avg_train_throughput"] = rate
            write_result(folder, result, repeat=repeat)
    return report(folder)


def test_the_winner_and_by_how_much_beyond_the_spread(tmp_path: Path) -> None:
    text = rates(tmp_path, ddp=(300.0, 310.0), manual_allreduce=(400.0, 420.0), sharded_server=(350.0, 360.0))
    assert (
        "Manual All-Reduce wins with 410.0 img/s (400.0 .. 420.0 over 2 repeats), 1.15 times Sharded"
        in text["In short"]
    )
    assert "that is 11.1 % beyond the spread" in text["In short"]
    assert "It is 1.34 times Baseline DDP." in text["In short"]


def test_no_winner_within_the_spread(tmp_path: Path) -> None:
    text = rates(tmp_path, ddp=(300.0, 410.0), manual_allreduce=(400.0, 420.0))
    assert "No strategy is clearly the fastest. Manual All-Reduce is ahead" in text["In short"]


def test_one_run_cannot_win(tmp_path: Path) -> None:
    text = rates(tmp_path, ddp=(300.0, 310.0), manual_allreduce=(400.0,))
    assert "Whether that is more than noise is not known: Manual All-Reduce ran once." in text["In short"]


def test_a_sweep_has_a_winner_for_each_count(tmp_path: Path) -> None:
    text = report(write_comparison(tmp_path, counts=(2, 4)))["In short"]
    assert "On 2 processes: Manual All-Reduce is the fastest" in text
    assert "On 4 processes: Manual All-Reduce is the fastest" in text
    assert "2 and 4 training processes (and one that serves, under Parameter Server (PS))" in text


def test_waiting_agreement_and_place_in_short(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("sharded_server", loss_shift=1.0))
    text = report(write_comparison(tmp_path))["In short"]
    assert "waits for communication 22.0 % under Baseline DDP (PyTorch), 18.0 % under Manual All-Reduce" in text
    assert "Manual All-Reduce and Parameter Server (PS) agree with Baseline DDP (PyTorch)" in text
    assert "Sharded Server does not agree with Baseline DDP (PyTorch)" in text
    assert "on Example CPU with 4 cores over gloo, torch 2.14.1, lightning 2.6.6" in text


# Throughput


@pytest.mark.parametrize(
    ("throughput", "sentence"),
    [(500.0, "500.0 img/s, 25.0 % more than"), (300.0, "300.0 img/s, 25.0 % less than"), (400.0, "as much as")],
)
def test_faster_and_slower(tmp_path: Path, throughput: float, sentence: str) -> None:
    text = pair(tmp_path, make_result("manual_allreduce", throughput=throughput), make_result("ddp", throughput=400.0))
    assert sentence in text["Throughput"]
    assert f"({throughput / 400:.2f}x)" in text["Throughput"]
    assert "Every method ran once: one run shows no spread" in text["Throughput"]


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [((410.0, 450.0), "is within the spread"), ((440.0, 450.0), "is beyond the spread")],
)
def test_a_difference_is_judged_by_the_repeats(tmp_path: Path, ours: tuple[float, float], sentence: str) -> None:
    for strategy, rates in (("ddp", (400.0, 420.0)), ("manual_allreduce", ours)):
        for repeat, rate in enumerate(rates, start=1):
            result = make_result(strategy)
            result["summary"]["avg_train_throughput"] = rate
            write_result(tmp_path, result, repeat=repeat)
    text = report(tmp_path)["Throughput"]
    assert sentence in text
    assert "400.0 .. 420.0 img/s" in text
    assert "one run shows no spread" not in text


def test_one_method_is_compared_with_nothing(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("manual_allreduce"))
    text = report(tmp_path)
    assert "nothing to compare" in text["Throughput"]
    assert "no Baseline DDP result" in text["Throughput"]
    assert "against" not in text["Convergence"]


# Convergence


def test_equal_losses_are_called_equal(tmp_path: Path) -> None:
    text = pair(tmp_path, make_result("manual_allreduce"))["Convergence"]
    assert "Over all 150 steps, Manual All-Reduce has exactly the losses of Baseline DDP (PyTorch)" in text
    assert "equal." in text


def test_rounding_is_no_disagreement(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["all_losses"] = [loss + 1e-5 for loss in ours["all_losses"]]
    text = pair(tmp_path, ours)["Convergence"]
    assert "differs from Baseline DDP (PyTorch) by at most 1e-05" in text
    assert "the curves agree." in text


def test_another_seed_agrees_within_the_scatter_and_a_shift_does_not(tmp_path: Path) -> None:
    seeded = pair(tmp_path / "a", make_result("manual_allreduce", loss_seed=1))["Convergence"]
    assert "the curves agree within that" in seeded
    shifted = pair(tmp_path / "b", make_result("manual_allreduce", loss_seed=1, loss_shift=0.1))["Convergence"]
    assert "the curves do not agree" in shifted
    assert "higher" in shifted


def test_a_wild_stretch_does_not_agree(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["all_losses"][60:70] = [3.0] * 10
    text = pair(tmp_path, ours)["Convergence"]
    assert "the curves do not agree" in text
    assert any(f"at step {step}," in text for step in range(61, 71))


def test_repeats_set_the_scale_of_agreement(tmp_path: Path) -> None:
    for repeat in (1, 2):
        for strategy, shift in (("ddp", 0.3 * repeat), ("manual_allreduce", 0.1 + 0.3 * repeat)):
            result = make_result(strategy, loss_shift=shift)
            write_result(tmp_path, result, repeat=repeat)
    text = report(tmp_path)["Convergence"]
    assert "repeats of one method differ by up to 0.3000: the curves agree within that" in text


def test_final_losses_and_their_difference(tmp_path: Path) -> None:
    theirs, ours = make_result("ddp"), make_result("manual_allreduce")
    theirs["all_losses"], ours["all_losses"] = [2.0] * 100, [2.0] * 50 + [1.5] * 50
    text = pair(tmp_path, ours, theirs)["Convergence"]
    assert "Final training loss 1.5000 and 2.0000 (-0.5000, -25.0 %)" in text
    assert "Baseline DDP (PyTorch): the training loss did not fall, 2.0000 -> 2.0000" in text
    assert "Manual All-Reduce: the training loss fell, 2.0000 -> 1.5000" in text


def test_different_lengths_and_lost_steps_are_told(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["all_losses"] = [*ours["all_losses"][:90], *[math.nan] * 10]
    text = pair(tmp_path, ours)["Convergence"]
    assert "the 90 steps with a finite loss in both (of 100 and 150)" in text
    assert "10 of them without a finite loss, the first at step 91" in text


def test_different_global_batches_are_not_compared_step_by_step(tmp_path: Path) -> None:
    text = pair(tmp_path, make_result("manual_allreduce", batch_size=32))
    assert "not compared step by step: a step is 64 images here and 32 there" in text["Convergence"]
    assert (
        "differ in global batch sizes: 32 (results_baseline_ddp.json); 64 (results_all_reduce.json)" in text["Warnings"]
    )


def test_one_step_is_too_few_to_judge(tmp_path: Path) -> None:
    theirs, ours = make_result("ddp"), make_result("manual_allreduce")
    theirs["all_losses"], ours["all_losses"] = [2.0], [1.0]
    assert "too few steps to tell" in pair(tmp_path, ours, theirs)["Convergence"]


# Communication


def test_waiting_and_what_a_step_would_gain(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["comm"] |= {"step_ms": 100.0, "exposed_ms": 20.0, "share_pct": 20.0, "total_ms": 50.0, "overlapped_ms": 30.0}
    text = pair(tmp_path, ours)["Communication"]
    assert "Manual All-Reduce waits 20.0 ms for communication in a step of 100.0 ms (20.0 %)" in text
    assert "without it a step would take 80.0 ms, 1.25x as fast" in text
    assert "30.0 ms of its 50.0 ms of communication run beside the computation." in text
    assert "At most" in text.split("Manual All-Reduce waits")[0]


def test_repeats_show_their_range(tmp_path: Path) -> None:
    for repeat, exposed in enumerate((10.0, 20.0, 30.0), start=1):
        ours = make_result("manual_allreduce")
        ours["comm"] |= {"step_ms": 100.0, "exposed_ms": exposed, "share_pct": exposed}
        write_result(tmp_path, ours, repeat=repeat)
    text = report(tmp_path)
    assert (
        "waits 20.0 ms (10.0 .. 30.0) for communication in a step of 100.0 ms (100.0 .. 100.0)" in text["Communication"]
    )
    assert "20.0 % (10.0 .. 30.0) under Manual All-Reduce" in text["In short"]


def test_parts_that_do_not_add_up_are_explained(tmp_path: Path) -> None:
    ours = make_result("parameter_server")
    assert "they do not add up" not in pair(tmp_path, ours)["Communication"]
    ours["comm"]["push_ms"] *= 2
    assert "they do not add up" in pair(tmp_path, ours)["Communication"]


def test_nothing_hidden_and_nothing_known(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["comm"] |= {"overlapped_ms": 0.0}
    bare = original_only(make_result("ddp"))
    for epoch in bare["epochs"]:
        del epoch["avg_comm_time"]
    text = pair(tmp_path, ours, bare)["Communication"]
    assert "None of its 25.3 ms of communication runs beside the computation" in text
    assert "results_baseline_ddp.json has no communication figures" in text


def test_original_files_say_what_they_cannot_tell(tmp_path: Path) -> None:
    bare = original_only(make_result("parameter_server"))
    write_result(tmp_path, make_result("ddp"))
    (tmp_path / "results_ps.json").write_text(json.dumps(bare))
    text = report(tmp_path)["Communication"]
    assert "communicates for at most 29.0 ms" in text
    assert "how much of it training waits for is not known" in text


# Scaling


def test_one_count_says_so(tmp_path: Path) -> None:
    text = report(write_comparison(tmp_path))["Scaling"]
    assert "All results are from 2 training processes: one count tells nothing about scaling" in text
    assert "--devices 2,4" in text


def test_scaling_is_computed(tmp_path: Path) -> None:
    for strategy, rates in (("ddp", (100.0, 150.0)), ("manual_allreduce", (100.0, 90.0))):
        for count, rate in zip((2, 4), rates, strict=True):
            write_result(tmp_path, make_result(strategy, training_processes=count, throughput=rate), sweep=True)
    text = report(tmp_path)["Scaling"]
    assert (
        "Baseline DDP (PyTorch): from 2 to 4 training processes 100.0 -> 150.0 img/s, 1.50x of an ideal 2.00x" in text
    )
    assert "(efficiency 75 %)" in text
    assert "Manual All-Reduce is slower with 4 training processes than with 2." in text


# Environment and warnings


def test_shared_facts_once_and_differing_ones_by_file(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["environment"]["torch"] = "2.15.0"
    text = pair(tmp_path, ours)
    assert "torch: 2.14.1 (results_baseline_ddp.json); 2.15.0 (results_all_reduce.json)" in text["Environment"]
    assert "lightning: 2.6.6 " in text["Environment"]
    assert "The runs differ in torch" in text["Warnings"]
    assert "Options of Manual All-Reduce: bucket_mib=25" in text["Environment"]


def test_demo_data_is_named_only_where_it_was_used(tmp_path: Path) -> None:
    assert "All runs used demo data (bundled" in report(write_comparison(tmp_path / "a"))["Warnings"]
    real = report(write_comparison(tmp_path / "b", demo_data=False, data="ImageNet"))
    assert "demo" not in real["Warnings"]
    assert "None: 3 files read, every run complete" in real["Warnings"]


def test_incomplete_and_short_runs(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce", epochs=1, complete=False)
    ours["config"]["trainer"]["max_epochs"] = 3
    assert "results_all_reduce.json is incomplete (1 of 3 epochs)" in pair(tmp_path / "a", ours)["Warnings"]
    del ours["complete"]
    assert "results_all_reduce.json has 1 epoch, others have up to 3." in pair(tmp_path / "b", ours)["Warnings"]


def test_noisy_repeats(tmp_path: Path) -> None:
    for repeat, rate in enumerate((300.0, 400.0), start=1):
        result = make_result("ddp")
        result["summary"]["avg_train_throughput"] = rate
        write_result(tmp_path, result, repeat=repeat)
    assert "is noisy: 300.0 .. 400.0 img/s over 2 repeats, 29 % of the median" in report(tmp_path)["Warnings"]


def test_epochs_that_scatter(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["epochs"][1]["train_throughput"] = 300.0
    text = pair(tmp_path, ours)["Warnings"]
    assert "Manual All-Reduce is noisy: 300.0 .. 432.0 img/s over its 3 epochs, 31 % of the median" in text
    assert "Baseline DDP (PyTorch) is noisy" not in text


@pytest.mark.parametrize(
    ("steps", "sentence"), [(3, "means over 3 steps"), (0, "0 steps (0: nothing but warm-up"), (20, "")]
)
def test_figures_from_few_steps(tmp_path: Path, steps: int, sentence: str) -> None:
    ours = make_result("manual_allreduce", epochs=1)
    ours["epochs"][0]["comm"] = ours["comm"] | {"measured_steps": steps}
    text = pair(tmp_path, ours)["Warnings"]
    assert (sentence in text) if sentence else ("too few to trust" not in text)


@pytest.mark.parametrize(("load", "busy"), [(9.0, True), ([9.0, 1.0, 1.0], True), (3.5, False), ("x", False)])
def test_a_machine_with_other_work(tmp_path: Path, load: object, busy: bool) -> None:
    """Two or three processes of a run explain a load of 3, but not one of 9."""
    ours = make_result("parameter_server")
    ours["environment"]["load_average"] = load
    text = pair(tmp_path, ours)["Warnings"]
    assert ("a load average of 9.00 when results_ps.json began" in text) is busy
    assert "differ in load_average" not in text


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("seed", "Their data order and losses need not be the same."),
        ("cpu_model", "Their speeds do not compare."),
        ("torch", "It may be that, and not the method."),
    ],
)
def test_what_a_difference_means(tmp_path: Path, key: str, sentence: str) -> None:
    ours = make_result("manual_allreduce")
    ours["environment"][key] = "other"
    text = pair(tmp_path, ours)["Warnings"]
    assert f"The runs differ in {key}: " in text
    assert sentence in text


def test_a_seed_is_told_once(tmp_path: Path) -> None:
    ours = make_result("manual_allreduce")
    ours["environment"]["seed"] = ours["config"]["seed_everything"] = 43
    assert pair(tmp_path, ours)["Warnings"].count("43") == 1


def test_unequal_worker_counts(tmp_path: Path) -> None:
    text = pair(
        tmp_path, make_result("parameter_server", training_processes=3), make_result("ddp", training_processes=4)
    )
    assert (
        "different numbers of training processes (Baseline DDP (PyTorch): 4; Parameter Server (PS): 3)"
        in text["Warnings"]
    )


def test_settings_that_differ_are_warned_of_and_what_must_differ_is_not(tmp_path: Path) -> None:
    ours = make_result("parameter_server")
    ours["config"]["trainer"] |= {"devices": 3, "strategy": {"class_path": "X"}, "precision": "bf16-mixed"}
    warnings = pair(tmp_path, ours)["Warnings"]
    assert "setting trainer.precision: 32-true (results_baseline_ddp.json); bf16-mixed (results_ps.json)" in warnings
    assert "trainer.devices" not in warnings
    assert "trainer.strategy" not in warnings


def test_broken_and_missing_files_are_in_the_text(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_ps.json").write_text("{")
    (tmp_path / "results_all_reduce.json").unlink()
    warnings = report(tmp_path)["Warnings"]
    assert "results_ps.json is left out" in warnings
    assert "results_all_reduce.json is not there" in warnings


# Curves


def test_running_mean_keeps_constants_and_skips_nan() -> None:
    assert running_mean([3.0] * 10, 5) == [3.0] * 10
    assert running_mean([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    smooth = running_mean([1.0, math.nan, 3.0], 3)
    assert (smooth[0], smooth[2]) == (1.0, 3.0)
    assert math.isnan(smooth[1])


@pytest.mark.parametrize("steps", [1, 10, 49, 50, 150, 10_001])
def test_the_last_smoothed_value_is_the_mean_of_the_last_steps(steps: int) -> None:
    losses, window = make_losses(steps), window_of(steps)
    assert window % 2 == 1
    tail = losses[-(window // 2 + 1) :]
    assert running_mean(losses, window)[-1] == pytest.approx(sum(tail) / len(tail))
