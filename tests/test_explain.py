"""Errors of the machine, in one line with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradsync.explain import one_line


def test_a_full_disk_is_told_with_the_flag_that_helps() -> None:
    with pytest.raises(OSError, match="No space") as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"checkpoint")
    line = one_line(caught.value)
    assert line is not None
    assert line.startswith("no space left on ")
    assert "--run_dir" in line


def test_an_error_that_nobody_knows_keeps_its_traceback() -> None:
    assert one_line(ArithmeticError("boom")) is None
