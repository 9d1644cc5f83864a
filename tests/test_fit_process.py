"""A command that runs fits leaves none of them, whenever Ctrl-C comes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gradsync.batch_size_trial import processes_of
from gradsync.fit_process import running_fit


class _InterruptedPopen(subprocess.Popen):
    """Ctrl-C comes when the process has been started, and before anybody could know its number."""

    started: int

    def _execute_child(self, *given: Any) -> None:
        super()._execute_child(*given)  # pyright: ignore[reportAttributeAccessIssue]
        type(self).started = self.pid
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_while_a_fit_is_started_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", _InterruptedPopen)
    handler = signal.getsignal(signal.SIGINT)
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(KeyboardInterrupt),
        running_fit(["fit", "--help"], log),
    ):
        pytest.fail("the interrupt was lost")
    assert processes_of(_InterruptedPopen.started) == []
    assert signal.getsignal(signal.SIGINT) is handler
