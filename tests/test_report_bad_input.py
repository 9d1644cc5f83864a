"""Whatever is in a folder or wrong with a disk: a report, or one clear error. Never a traceback, never half a file."""

import contextlib
import errno
import json
import math
import os
import resource
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commands import gradsync
from result_files import make_result, original_only, write_comparison, write_result
from rich.console import Console

from gradsync.errors import UserError
from gradsync.report import load_comparison, make_report
from gradsync.report.before_after import BeforeAfter
from gradsync.report.change_report import change_lines, change_table
from gradsync.report.differences import difference_lines
from gradsync.report.document import NO_BREAK, document_of
from gradsync.report.files import atomic_write_text
from gradsync.report.html import as_html
from gradsync.report.text import as_text

ODD = "../x/ü 日本 'a' \"b\" <b>&[red]$x$\u202e\ud800\x00\x1b[31m\n\t_"
WRITTEN = {"performance_report.txt", "report.html", "plots"}


def report(folder: Path) -> str:
    """What is printed; text and page are checked to be there and whole."""
    output = StringIO()
    paths = make_report(folder, Console(file=output, width=100, color_system=None))
    assert len(paths.plots) == 5
    assert paths.text.read_text().endswith("\n")
    assert paths.page.read_text().endswith("</html>\n")
    assert not list(folder.rglob("*.part"))
    return output.getvalue()


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        make_report(folder, Console(file=StringIO(), width=100))
    return str(caught.value)


# Contents


def diverged() -> dict[str, Any]:
    result = make_result("ddp", all_losses=[math.nan] * 9)
    for epoch in result["epochs"]:
        epoch |= {"train_loss": math.nan, "val_loss": math.nan, "val_accuracy": math.nan}
    return result


def odd() -> dict[str, Any]:
    result = make_result("ddp", method=ODD, data=ODD)
    result["environment"] |= {ODD: ODD, "strategy_options": {ODD: {ODD: [ODD]}}}
    result["config"] |= {ODD: {ODD: ODD}}
    return result


def huge() -> dict[str, Any]:
    result = make_result("ddp", all_losses=[1e308, -1e308, 1e-320, 0] * 4, batch_size=10**30)
    result["comm"] |= {"step_ms": 1e308, "exposed_ms": 1e308, "bytes_per_step": 10**400}
    return result


FOLDERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "losses that are no numbers": (diverged, "no step has a finite loss"),
    "one strategy": (lambda: make_result("manual_allreduce"), "There is nothing to beat"),
    "one epoch of one step": (lambda: make_result("ddp", epochs=1, steps_per_epoch=1), "in 1 step"),
    "original keys only": (lambda: original_only(make_result("parameter_server")), "No environment recorded"),
    "odd names": (odd, "'a' \"b\" <b>&[red]$x$"),
    "numbers too large": (huge, "must be a finite number"),
    "no losses": (lambda: make_result("ddp", all_losses=[]), "no loss per step"),
    "no step": (lambda: make_result("ddp", comm=None, summary=None, config=None, environment=None), "Baseline DDP"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_with_little_in_it_makes_a_report(kind: str, tmp_path: Path) -> None:
    make, words = FOLDERS[kind]
    write_result(tmp_path, make())
    report(tmp_path)
    assert words in " ".join((tmp_path / "performance_report.txt").read_text().split())
    folders = BeforeAfter(load_comparison(tmp_path), load_comparison(tmp_path))
    assert change_table(folders).as_text()
    assert difference_lines(folders) == []


def test_no_control_character_leaves_a_file(tmp_path: Path) -> None:
    write_result(tmp_path, odd())
    (tmp_path / "failed_x.json").write_text(json.dumps({"error": ODD, "method": ODD, "log": "../" * 9}))
    printed = report(tmp_path)
    for text in (printed, (tmp_path / "performance_report.txt").read_text(), (tmp_path / "report.html").read_text()):
        assert all(character.isprintable() or character in ("\n", NO_BREAK) for character in text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "half-written perhaps"),
        ('{"method": "x", "epochs": [{"epoch": 1', "half-written perhaps"),
        ("null", "must hold a JSON object"),
        ("[" * 60 + "]" * 60, "nested more than 40 deep"),
        ('{"a":' * 600 + "1" + "}" * 600, "nested more than 40 deep"),
        ("9" * 5000, "no complete JSON"),
    ],
)
def test_a_broken_file_is_named_alone_and_among_others(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "results_ps.json").write_text(content)
    alone = error_of(tmp_path)
    assert "results_ps.json is left out" in alone
    assert words in alone
    write_result(tmp_path, make_result("ddp"))
    assert words in report(tmp_path)


def test_folders_and_files_may_have_any_name(tmp_path: Path) -> None:
    """Also such that are no UTF-8."""
    name = "a 'b' \"c\" <d> [e] & $f ü 日本 \\".encode() + b"\xff"
    folder = tmp_path / os.fsdecode(name)
    write_comparison(folder)
    (folder / os.fsdecode(b"results_\xfe.json")).write_text(json.dumps(make_result("x")))
    (folder / os.fsdecode(b"results_\xfd.json")).write_text("{")
    ended = gradsync("report", str(folder), cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert set(os.listdir(folder)) >= WRITTEN


def test_a_terminal_that_lacks_the_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(tmp_path, make_result("ddp", method="日本"))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ended = gradsync("report", ".", cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert "??" in ended.output


@pytest.mark.parametrize("wrong", ["text", -1, 0, None, [], {"a": {}}, [None], math.nan, 1e308, 10**400, True, ODD])
def test_any_single_value_may_be_broken(tmp_path: Path, wrong: Any) -> None:
    """Every value of a file in turn: text, page and changes are made all the same."""

    def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        return [prefix, *(place for key, item in items for place in places(item, (*prefix, key)))]

    write_result(tmp_path, make_result("ddp", epochs=1, steps_per_epoch=3))
    before = load_comparison(tmp_path)
    original = json.dumps(make_result("parameter_server", epochs=1, steps_per_epoch=3))
    for place in places(json.loads(original))[1:]:
        broken = json.loads(original)
        target = broken
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = wrong
        (tmp_path / "results_ps.json").write_text(json.dumps(broken))
        after = load_comparison(tmp_path)
        document = document_of(after)
        assert as_text(document)
        assert as_html(document, None)
        for folders in (BeforeAfter(before, after), BeforeAfter(after, before), BeforeAfter(after, after)):
            assert change_table(folders).as_text()
            assert change_lines(folders) is not None
            assert difference_lines(folders) is not None


# Disks


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    """The kernel's limit on a file's size ends a write in the middle, as a full disk does."""
    report(write_comparison(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    smallest = min(len(content) for path, content in before.items() if path.suffix == ".png")
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, limits[1]))
    try:
        error = error_of(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in error
    assert "throughput_comparison.png" in error
    assert "\n" not in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_the_disk_says_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write_comparison(tmp_path)

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))  # names no file, as a failing write does

    monkeypatch.setattr(os, "fsync", refuse)
    error = error_of(tmp_path)
    assert os.strerror(code) in error
    assert str(tmp_path / "performance_report.txt") in error
    assert {path.name for path in tmp_path.iterdir()} & WRITTEN == set()
    assert not list(tmp_path.glob(".*"))


def test_a_write_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match=r"Is a directory|Directory not empty") as caught:
        atomic_write_text(tmp_path / "a", "x")
    assert caught.value.filename == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    write_comparison(tmp_path).chmod(0o555)
    try:
        assert os.strerror(errno.EACCES) in error_of(tmp_path)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_takes_nothing(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(Path("/dev/full").open("w", buffering=1))
        with pytest.raises(UserError, match="standard output"):
            make_report(tmp_path, Console(file=full, width=100))
        stack.pop_all()
    with contextlib.suppress(OSError):  # it writes what is left over
        full.close()
