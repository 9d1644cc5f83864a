"""`make_report`: what a user sees, and what goes wrong."""

import ast
import sys
from io import StringIO
from pathlib import Path

import pytest
from result_files import make_result, write_comparison, write_result
from rich.console import Console

import gradsync.report
from gradsync.errors import UserError
from gradsync.report import make_report


def run(folder: Path, width: int = 100) -> str:
    output = StringIO()
    make_report(folder, Console(file=output, width=width, color_system=None))
    return output.getvalue()


def test_tables_then_paths_then_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("some where") / "comparison"
    write_comparison(folder)
    (folder / "tensorboard").mkdir()
    text = run(folder, width=60)
    paths = make_report(folder, Console(file=StringIO()))
    assert str(paths.text) == "some where/comparison/performance_report.txt"
    assert len(paths.plots) == 5
    lines = [line.strip() for line in text.splitlines()]
    assert str(paths.page) == "some where/comparison/report.html"
    for path in (paths.text, paths.page, *paths.plots):
        assert path.is_file()
        assert str(path) in lines
    assert lines[-2] == "tensorboard --logdir 'some where/comparison/tensorboard'"
    assert lines[-1].endswith("/#custom_scalars")
    assert text.index("Throughput and accuracy") < text.index("Communication per step") < text.index("Written:")
    assert str(tmp_path) not in text


def test_without_logs_no_command_leads_astray(tmp_path: Path) -> None:
    text = run(write_comparison(tmp_path))
    assert "--logdir" not in text
    assert f"No TensorBoard logs in {tmp_path / 'tensorboard'}" in text


def test_the_text_report_holds_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a path in the text may be as long as it likes
    folder = Path("comparison")
    folder.mkdir()
    write_comparison(folder, repeats=2)
    run(folder)
    text = (folder / "performance_report.txt").read_text()
    for word in ("| Manual All-Reduce", "Speed-up vs", "All-", "Warnings\n--------"):
        assert word in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_broken_files_are_named_and_the_report_is_made_from_the_rest(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "results_ps.json").write_text('{"method": ')
    text = run(tmp_path)
    assert "Warning: results_ps.json is left out" in text
    assert "Manual All-Reduce" in text
    assert len(list((tmp_path / "plots").iterdir())) == 5


def test_many_warnings_are_counted_not_poured_out(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"results_x{index}.json").write_text("{")
    write_result(tmp_path, make_result("ddp"))
    text = run(tmp_path)
    assert text.count("Warning:") == 12
    assert "more warnings, in the text report" in text
    assert "results_x9.json is left out" in (tmp_path / "performance_report.txt").read_text()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, ("There is no folder", "results_*.json", "gradsync compare --output DIR")),
        (lambda folder: folder.mkdir(), ("There is no result in", "results_*.json", "gradsync compare")),
        (lambda folder: folder.write_text(""), ("There is no folder",)),
    ],
)
def test_nothing_to_report_on(tmp_path: Path, prepare, words: tuple[str, ...]) -> None:
    folder = tmp_path / "runs"
    prepare(folder)
    with pytest.raises(UserError) as caught:
        run(folder)
    assert all(word in str(caught.value) for word in (*words, str(folder)))
    assert "\n" not in str(caught.value)


def test_only_unusable_results_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "results_ps.json").write_text("")
    (tmp_path / "failed_all_reduce.json").write_text('{"error": "no such interface"}')
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    assert "results_ps.json is left out" in str(caught.value)
    assert "no such interface" in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(UserError, match="plots"):
        run(tmp_path)


def test_without_matplotlib_tables_and_text_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_comparison(tmp_path)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    output = StringIO()
    with pytest.raises(UserError, match="pip install matplotlib"):
        make_report(tmp_path, Console(file=output, width=100))
    assert "Speed-up" in output.getvalue()
    assert (tmp_path / "performance_report.txt").is_file()
    assert "Without pictures: matplotlib was not there" in (tmp_path / "report.html").read_text()


def test_nothing_heavy_is_imported_at_the_top() -> None:
    """Neither torch nor Lightning nor pyplot's global state anywhere; matplotlib and rich only inside functions."""
    for path in Path(gradsync.report.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {name for node in ast.walk(tree) for name in _modules(node)}
        assert not {name.split(".")[0] for name in imported} & {"torch", "lightning"}, path
        assert "matplotlib.pyplot" not in imported, path
        at_top = {name.split(".")[0] for node in tree.body for name in _modules(node)}
        assert not at_top & {"matplotlib", "rich", "numpy"}, path


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []
