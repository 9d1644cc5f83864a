"""The two tables: their figures, and that no width of terminal loses one."""

import json
import math
from io import StringIO
from pathlib import Path

import pytest
from result_files import make_result, original_only, write_comparison, write_result
from rich.console import Console

from gradsync.report.comparison import Comparison
from gradsync.report.results import load_results
from gradsync.report.tables import Table, communication_table, throughput_table


def load(folder: Path) -> Comparison:
    return Comparison.of(folder, load_results(folder))


def printed(table: Table, width: int) -> str:
    output = StringIO()
    Console(file=output, width=width, color_system=None).print(table.as_rich())
    return output.getvalue()


def test_speed_up_is_the_ratio_of_throughputs(tmp_path: Path) -> None:
    for strategy, throughput in (("ddp", 400.0), ("manual_allreduce", 500.0), ("parameter_server", 300.0)):
        write_result(tmp_path, make_result(strategy, throughput=throughput))
    rows = throughput_table(load(tmp_path)).rows
    assert [row[0] for row in rows] == ["Baseline DDP (PyTorch)", "Manual All-Reduce", "Parameter Server (PS)"]
    assert [row[1] for row in rows] == ["2", "2", "2 + 1 server"]
    assert [row[2] for row in rows] == ["400.0", "500.0", "300.0"]
    assert [row[5] for row in rows] == ["1.00x", "1.25x", "0.75x"]


def test_speed_up_compares_equal_process_counts(tmp_path: Path) -> None:
    rates = {("ddp", 2): 100.0, ("ddp", 4): 200.0, ("manual_allreduce", 2): 110.0, ("manual_allreduce", 4): 150.0}
    for (strategy, count), throughput in rates.items():
        result = make_result(strategy, training_processes=count, throughput=throughput)
        write_result(tmp_path, result, sweep=True)
    assert [row[5] for row in throughput_table(load(tmp_path)).rows] == ["1.00x", "1.00x", "1.10x", "0.75x"]


def test_the_range_of_a_speed_up_pairs_interleaved_repeats(tmp_path: Path) -> None:
    # The machine is twice as slow in repeat 2; the method is 1.5 times as fast throughout.
    for repeat, slowness in ((1, 1.0), (2, 2.0), (3, 1.0)):
        for strategy, throughput in (("ddp", 400.0), ("manual_allreduce", 600.0)):
            result = make_result(strategy)
            result["summary"]["avg_train_throughput"] = throughput / slowness
            write_result(tmp_path, result, repeat=repeat)
    comparison = load(tmp_path)
    speed_up = comparison.speed_up(comparison.groups[1])
    assert (speed_up.median, speed_up.low, speed_up.high) == (1.5, 1.5, 1.5)
    assert comparison.groups[1].throughput.low == 300.0


def test_another_number_of_training_processes_in_the_baseline_is_marked(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("ddp", training_processes=4, throughput=400.0))
    write_result(tmp_path, make_result("parameter_server", training_processes=3, throughput=300.0))
    table = throughput_table(load(tmp_path))
    assert [row[5] for row in table.rows] == ["1.00x", "0.75x*"]
    assert any(note.startswith("*:") and "(4)" in note for note in table.notes)


def test_without_baseline_there_is_no_speed_up(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("manual_allreduce"))
    assert throughput_table(load(tmp_path)).rows[0][5] == "-"


def test_communication_of_every_method(tmp_path: Path) -> None:
    comparison = load(write_comparison(tmp_path))
    ddp, ours, server = communication_table(comparison).rows
    assert ddp[1:3] == ours[1:3] == ("-", "-")
    assert server[3] == "-"
    assert all(cell != "-" for row in (ddp, ours) for cell in row[3:])
    assert all(cell != "-" for cell in (*server[1:3], *server[4:]))
    assert ddp[3] == ddp[4]
    assert ddp[4].startswith("<=")
    assert not ours[4].startswith("<=")
    assert (ddp[6], ours[6], server[6]) == ("22.0", "18.0", "34.0")


def test_communication_of_original_files(tmp_path: Path) -> None:
    for strategy, seconds in (
        ("ddp", {"avg_comm_time": 0.02}),
        ("parameter_server", {"avg_comm_time_pull": 0.01, "avg_comm_time_push": 0.03}),
    ):
        result = make_result(strategy)
        for epoch in result["epochs"]:
            epoch |= seconds
        write_result(tmp_path, result).write_text(json.dumps(original_only(result)))
    ddp, server = communication_table(load(tmp_path)).rows
    assert ddp[1:] == ("-", "-", "20.0", "20.0", "-", "-")
    assert server[1:] == ("10.0", "30.0", "-", "<=40.0", "-", "-")


def test_repeats_show_median_and_range(tmp_path: Path) -> None:
    for repeat, throughput in enumerate((390.0, 400.0, 420.0), start=1):
        result = make_result("ddp")
        result["summary"]["avg_train_throughput"] = throughput
        write_result(tmp_path, result, repeat=repeat)
    table = throughput_table(load(tmp_path))
    assert table.rows[0][2] == "400.0\n390.0 .. 420.0"
    assert any("3 repeats" in note for note in table.notes)


def test_figures_that_are_not_there_are_dashes(tmp_path: Path) -> None:
    result = make_result("ddp", comm={}, summary={})
    for epoch in result["epochs"]:
        epoch |= {"train_throughput": None, "train_time": math.nan, "val_accuracy": None, "avg_batch_time": None}
        del epoch["comm"], epoch["avg_comm_time"]
    write_result(tmp_path, result)
    comparison = load(tmp_path)
    assert throughput_table(comparison).rows[0][2:] == ("-", "-", "-", "-")
    assert communication_table(comparison).rows[0][1:] == ("-",) * 6


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("repeats", [1, 3])
def test_no_figure_is_cut_off_in_a_narrow_terminal(tmp_path: Path, width: int, repeats: int) -> None:
    comparison = load(write_comparison(tmp_path, repeats=repeats))
    for table in (throughput_table(comparison), communication_table(comparison)):
        text = printed(table, width)
        assert "…" not in text
        if width >= 80:
            figures = [word for row in table.rows for cell in row[2:] for word in cell.split()]
            assert all(figure in text.split() for figure in figures)


def test_names_are_no_markup(tmp_path: Path) -> None:
    write_result(tmp_path, make_result("[red]x[/red]"))
    table = throughput_table(load(tmp_path))
    assert "[red]x[/red]" in printed(table, 120).replace(" ", "").lower()
    assert "[red]x[/red]" in table.as_text().lower()


def test_text_has_the_same_figures_in_plain_ascii(tmp_path: Path) -> None:
    table = communication_table(load(write_comparison(tmp_path, repeats=2)))
    text = table.as_text()
    assert text.isascii()
    assert all(word in text for row in table.rows for cell in row for word in cell.split())
    assert not any(line != line.rstrip() for line in text.splitlines())
