"""A file written by the report is old or new, never half."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from gradsync.report.files import atomic_write_json, atomic_write_text


def test_write_makes_parents_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    atomic_write_text(path, "first")
    atomic_write_text(path, "zweitens: ä")
    assert path.read_text(encoding="utf-8") == "zweitens: ä"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_keeps_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "results.json"
    atomic_write_json(path, {"epochs": 1})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_json(path, {"epochs": 2})
    assert json.loads(path.read_text()) == {"epochs": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_new_content_is_complete_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    replace, seen = os.replace, []

    def look(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(source).parent, Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    atomic_write_text(path, "x" * 100_000)
    assert seen == [("x" * 100_000, tmp_path, path)]


def test_a_written_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write_text(tmp_path / "atomic", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_json_holds_no_nan_and_plain_values_only(tmp_path: Path) -> None:
    data = {"nan": math.nan, "list": [1.5, math.inf, -math.inf], "numpy": np.float32(0.5)}
    data |= {"path": Path("a/b"), "t": (1,)}
    atomic_write_json(tmp_path / "x.json", data)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    loaded = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert loaded == {"nan": None, "list": [1.5, None, None], "numpy": 0.5, "path": "a/b", "t": [1]}


def test_an_object_that_json_cannot_hold_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic_write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]
