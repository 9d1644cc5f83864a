"""The commands of docs/inspect.md, all in this process: as many starts would take a minute."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from inspecting import shown
from test_docs import ROOT, _commands, _write_files, blocks_of
from torchvision import models

PAGE = ROOT / "docs" / "inspect.md"


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("llama_config.py")
    torch.save(models.resnet18().state_dict(), "resnet18.pth")
    commands = [c for block in blocks_of(PAGE) if block.mark == "parsed only" for c in _commands(block.text)]
    assert len(commands) == 9
    for name, *arguments in commands:
        assert name == "inspect"
        assert shown(*arguments)
