"""``gradsync report BEFORE AFTER``: ratios, what is beyond the spread, and exit codes for other people's CI."""

import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commands import gradsync
from result_files import make_result, original_only, write_comparison, write_result
from rich.console import Console

from gradsync.errors import UserError
from gradsync.report import load_comparison
from gradsync.report.before_after import BeforeAfter
from gradsync.report.change_report import change_lines, change_table, print_changes
from gradsync.report.command import main
from gradsync.report.differences import difference_lines


def write(folder: Path, rates: dict[str, list[float]], **changes: Any) -> Path:
    """One file for each strategy and rate."""
    for strategy, numbers in rates.items():
        for repeat, rate in enumerate(numbers, start=1):
            result = make_result(strategy, throughput=rate, **changes)
            result["summary"]["avg_train_throughput"] = rate
            write_result(folder, result, repeat=repeat)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """All-reduce lost a tenth, DDP nothing beyond its spread; each folder has a strategy of its own."""
    before = {"ddp": [400.0, 410.0], "manual_allreduce": [500.0, 504.0], "old": [1.0, 2.0]}
    after = {"ddp": [398.0, 408.0], "manual_allreduce": [450.0, 453.6], "new": [1.0, 2.0]}
    return write(tmp_path / "before", before), write(tmp_path / "after", after)


def load(before: Path, after: Path) -> BeforeAfter:
    return BeforeAfter(load_comparison(before), load_comparison(after))


def printed(folders: BeforeAfter, width: int = 80) -> str:
    output = StringIO()
    print_changes(folders, Console(file=output, width=width, color_system=None))
    return output.getvalue()


def code_of(*arguments: object) -> int:
    """The exit code that the command line gives; argparse ends with SystemExit, the others with UserError."""
    try:
        main([str(argument) for argument in arguments])
    except UserError:
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# Ratios


def test_ratio_and_its_range(folders: tuple[Path, Path]) -> None:
    ddp, ours = load(*folders).methods
    assert ours.throughput.ratio.median == pytest.approx(451.8 / 502)
    assert ours.throughput.ratio.low == pytest.approx(450 / 504)
    assert ours.throughput.ratio.high == pytest.approx(453.6 / 500)
    assert (ddp.throughput.verdict, ours.throughput.verdict) == ("noise", "worse")


def test_the_other_way_round_better_becomes_worse(folders: tuple[Path, Path]) -> None:
    """And the ratios are inverse: a law for every figure."""
    there, back = load(*folders), load(*reversed(folders))
    swapped = {"better": "worse", "worse": "better"}
    for one, other in zip(there.methods, back.methods, strict=True):
        for change, inverse in zip(one.changes, other.changes, strict=True):
            assert change.ratio.median * inverse.ratio.median == pytest.approx(1)
            assert change.ratio.low * inverse.ratio.high == pytest.approx(1)
            assert swapped.get(change.verdict, change.verdict) == inverse.verdict


def test_a_longer_step_is_worse_and_more_throughput_is_better(folders: tuple[Path, Path]) -> None:
    verdicts = {change.figure: change.verdict for change in load(*reversed(folders)).methods[1].changes}
    assert verdicts["throughput (img/s)"] == "better"
    assert verdicts["step (ms)"] == "better"
    assert verdicts["exposed (ms)"] == "better"
    assert verdicts["best accuracy (%)"] == "same"


def test_a_folder_with_itself_is_the_same(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, repeats=2)
    for method in load(folder, folder).methods:
        assert {change.verdict for change in method.changes} == {"same"}
        assert {change.ratio.median for change in method.changes} == {1.0}
    assert difference_lines(load(folder, folder)) == []


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    folders = load(write(tmp_path / "a", {"ddp": [400.0]}), write(tmp_path / "b", {"ddp": [300.0, 310.0]}))
    assert folders.methods[0].throughput.verdict == "one run"
    assert any("One run shows no spread" in line for line in change_lines(folders))


def test_methods_match_by_process_count(tmp_path: Path) -> None:
    before = write_comparison(tmp_path / "a", counts=(2, 4))
    after = write_comparison(tmp_path / "b", counts=(4, 8))
    folders = load(before, after)
    assert {method.label for method in folders.methods} == {
        f"{name} on 4 processes" for name in ("Baseline DDP (PyTorch)", "Manual All-Reduce", "Parameter Server (PS)")
    }
    assert len(folders.only_in(folders.before)) == len(folders.only_in(folders.after)) == 3


def test_files_of_original_keys_can_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(tmp_path / name, original_only(make_result("ddp")) | {"strategy": "ddp"})
    folders = load(tmp_path / "a", tmp_path / "b")
    verdicts = {change.figure: change.verdict for change in folders.methods[0].changes}
    assert verdicts["exposed (ms)"] == "-"
    assert verdicts["throughput (img/s)"] == "same"


# What is printed


def test_who_is_only_in_one_of_them_is_named(folders: tuple[Path, Path]) -> None:
    text = printed(load(*folders))
    assert f"Only before ({folders[0]}): Old." in text
    assert f"Only after ({folders[1]}): New." in text
    assert "Manual All-Reduce: throughput (img/s) 0.900x, worse beyond the spread." in text
    assert not any("Baseline DDP" in line for line in change_lines(load(*folders)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_is_cut_off(folders: tuple[Path, Path], width: int) -> None:
    table, text = change_table(load(*folders)), printed(load(*folders), width)
    assert "…" not in text
    assert all(word in text.split() for row in table.rows for cell in row[1:] for word in cell.split())


def test_a_usual_terminal_shows_a_figure_on_one_line(folders: tuple[Path, Path]) -> None:
    lines = printed(load(*folders), 80).splitlines()
    assert any("450.0 .. 453.6" in line and "500.0 .. 504.0" in line for line in lines)


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    text = printed(load(write(tmp_path / "a", {"x": [1.0]}), write(tmp_path / "b", {"y": [1.0]})))
    assert "have no method in common" in text


def test_what_else_changed_is_named_and_what_differs_by_nature_is_not(tmp_path: Path) -> None:
    before = write(tmp_path / "a", {"ddp": [400.0], "manual_allreduce": [400.0]})
    for strategy in ("ddp", "manual_allreduce"):
        result = make_result(strategy, batch_size=8)
        result["environment"] |= {"torch": "9.9", "load_average": 5.0}
        result["config"]["trainer"] |= {"precision": "bf16", "devices": 7}
        if strategy == "manual_allreduce":
            result["environment"]["strategy_options"] = {"bucket_mib": 1}
        write_result(tmp_path / "b", result)
    lines = difference_lines(load(before, tmp_path / "b"))
    assert "torch: 2.14.1 before, 9.9 after" in lines
    assert "global batch size: 32 before, 16 after" in lines
    assert "options of Manual All-Reduce: bucket_mib=25 before, bucket_mib=1 after" in lines
    assert "setting trainer.precision: 32-true before, bf16 after" in lines
    assert not any("devices" in line or "load" in line for line in lines)


def test_names_are_no_markup(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(tmp_path / name, make_result("x", method="[red]x[/red] </script>"))
    assert "[red]x[/red]" in printed(load(tmp_path / "a", tmp_path / "b"), 120)


# Exit codes


@pytest.mark.parametrize(("limit", "code"), [(0.95, 1), (0.90, 0), (0.5, 0), (1.0, 1)])
def test_fail_below(folders: tuple[Path, Path], limit: float, code: int) -> None:
    assert code_of(*folders, "--fail-below", limit) == code


def test_the_losers_are_named_in_one_closing_line(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as caught:
        main([*map(str, folders), "--fail-below", "0.95"])
    assert str(caught.value) == "throughput below 0.95 times what it was: Manual All-Reduce (0.900x)"


def test_a_loss_within_the_spread_says_so(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=re.escape("Baseline DDP (PyTorch) (0.995x, within the spread of the repeats)")):
        main([*map(str, folders), "--fail-below", "1"])


def test_no_loss_says_so(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*folders, "--fail-below", "0.5") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "No throughput is below 0.5 times what it was (2 methods; least: Manual All-Reduce, 0.900x)."


def test_without_the_flag_a_loss_is_no_failure(folders: tuple[Path, Path]) -> None:
    assert code_of(*folders) == 0


def test_a_throughput_that_is_gone_is_a_loss(tmp_path: Path) -> None:
    before = write(tmp_path / "a", {"ddp": [400.0]})
    result = make_result("ddp", summary={})
    for epoch in result["epochs"]:
        epoch["train_throughput"] = math.nan
    write_result(tmp_path / "b", result)
    with pytest.raises(UserError, match=r"no figure any more"):
        main([str(before), str(tmp_path / "b"), "--fail-below", "0.1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}", "--fail-below", "0.95"], "--fail-below compares two folders, got one"),
        (["{a}", "{a}", "{a}"], "give one DIR, or two to compare, got 3"),
        ([], "DIR"),
        (["{a}", "{a}", "--fail-below", "95"], "must be a share between 0 and 1"),
        (["{a}", "{a}", "--fail-below", "nan"], "must be a share between 0 and 1"),
        (["{a}", "{a}", "--fail-below", "x"], "must be a share between 0 and 1"),
        (["{a}", "{nothing}"], "There is no folder"),
        (["{empty}", "{a}"], "There is no result in"),
        (["{a}", "{other}", "--fail-below", "0.9"], "nothing was checked"),
    ],
)
def test_wrong_usage_is_code_2(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", {"ddp": [400.0]})
    write(tmp_path / "other", {"x": [400.0]})
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("a", "other", "empty", "nothing")}
    assert code_of(*(argument.format(**places) for argument in arguments)) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_command_as_a_ci_runs_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Code and order: the closing line is the last one where both streams go into one log."""
    ended = gradsync("report", "before", "after", "--fail-below", "0.95", cwd=tmp_path)
    assert ended.code == 1
    assert ended.output.splitlines()[-1].endswith("what it was: Manual All-Reduce (0.900x)")
    assert "Traceback" not in ended.output
    assert gradsync("report", "before", "after", cwd=tmp_path).code == 0
    assert gradsync("report", "before", "--fail-below", "0.95", cwd=tmp_path).code == 2
