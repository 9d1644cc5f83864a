"""A checkpoint is whole or not there, a damaged one is not loaded, and a full disk costs no run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import gradsync, tiny_fit

from gradsync import UserError
from gradsync.checkpoints import DurableCheckpointIO
from gradsync.checkpoints.manifest import Manifest


def _checkpoint(number: int) -> dict[str, object]:
    return {"state_dict": {"weight": torch.full((50_000,), float(number))}, "global_step": number}


def _step(path: Path) -> int:
    return DurableCheckpointIO(falls_back=True).load_checkpoint(path)["global_step"]


def _save(folder: Path, number: int, name: str | None = None) -> Path:
    path = folder / (name or f"step={number}.ckpt")
    DurableCheckpointIO().save_checkpoint(_checkpoint(number), path)
    return path


def test_what_is_saved_is_what_is_loaded_and_the_usual_tool_agrees(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].eq(1).all()
    assert _step(path) == 1
    subprocess.run(["sha256sum", "--check", Manifest(path).path.name], cwd=tmp_path, check=True)
    assert sorted(os.listdir(tmp_path)) == ["step=1.ckpt", "step=1.ckpt.sha256"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("harm", [_flip, _cut])
def test_a_damaged_checkpoint_is_refused_by_name(harm, with_manifest: bool, tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    if not with_manifest:
        Manifest(path).path.unlink()
    harm(path)
    with pytest.raises(UserError, match=r"checkpoint .*step=1\.ckpt is damaged .*--ckpt_path"):
        DurableCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("harm", [_flip, _cut])
def test_a_fit_falls_back_to_the_newest_good_one(harm, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        path = _save(tmp_path, number)
        os.utime(path, ns=(number, number))  # clocks of file systems are coarse
    harm(tmp_path / "step=3.ckpt")
    with pytest.warns(UserWarning, match=r"step=3\.ckpt is damaged .*going on from .*step=2\.ckpt"):
        assert _step(tmp_path / "step=3.ckpt") == 2


def test_with_no_good_one_left_it_says_so(tmp_path: Path) -> None:
    for number in (1, 2):
        _flip(_save(tmp_path, number))
    with pytest.raises(UserError, match=r"no other in .* is good"):
        _step(tmp_path / "step=2.ckpt")


def test_a_missing_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(FileNotFoundError):
        _step(tmp_path / "step=2.ckpt")


def _save_for_ever(path: Path) -> None:
    io = DurableCheckpointIO()
    for number in range(1_000_000):
        io.save_checkpoint(_checkpoint(number), path)


def test_a_kill_at_any_moment_leaves_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    _save(tmp_path, -1, "last.ckpt")
    for trial in range(30):
        if (pid := os.fork()) == 0:
            _save_for_ever(path)
        time.sleep(0.01 + 0.0037 * trial)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert DurableCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].numel() == 50_000
    _save(tmp_path, 1, "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.ckpt.sha256"], "leftovers"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MB, of which a checkpoint takes a fifth."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_no_run_and_no_earlier_checkpoint(small_disk: Path) -> None:
    io = DurableCheckpointIO()
    io.save_checkpoint(_checkpoint(1), small_disk / "a.ckpt")
    (small_disk / "ballast").write_bytes(bytes(700_000))
    with pytest.warns(UserWarning, match=r"no space left: checkpoint .*b\.ckpt was not saved, earlier ones are kept"):
        io.save_checkpoint(_checkpoint(2), small_disk / "b.ckpt")
    io.remove_checkpoint(small_disk / "a.ckpt")  # as ModelCheckpoint does when it believes in b
    assert _step(small_disk / "a.ckpt") == 1
    assert not (small_disk / "b.ckpt").exists()
    (small_disk / "ballast").unlink()
    io.save_checkpoint(_checkpoint(3), small_disk / "c.ckpt")
    assert sorted(os.listdir(small_disk)) == ["c.ckpt", "c.ckpt.sha256"]


def _fit(folder: Path, *options: str, epochs: int) -> str:
    ended = gradsync(
        *tiny_fit("manual_allreduce", 2), "--trainer.max_epochs", str(epochs), "--run_dir", "run", *options, cwd=folder
    )
    assert ended.code == 0, ended.output
    return ended.output


def test_a_run_that_goes_on_falls_back_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=3)
    folder = tmp_path / "run" / "checkpoints"
    kept = sorted(path.name for path in folder.glob("*.ckpt"))
    assert len(kept) == 3, kept
    assert kept[-1] == "last.ckpt"
    _flip(folder / "last.ckpt")
    _flip(folder / kept[1])
    output = _fit(tmp_path, "--ckpt_path", "last", "--async_checkpoints", "true", epochs=4)
    assert output.count("last.ckpt is damaged") == 1
    assert kept[0] in output
    assert "epoch 3/4" in output, output
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 3
    subprocess.run(["sha256sum", "--check", "last.ckpt.sha256"], cwd=folder, check=True)


def test_last_of_a_run_without_a_folder_is_refused(tmp_path: Path) -> None:
    ended = gradsync(*tiny_fit("ddp", 1), "--ckpt_path", "last", cwd=tmp_path)
    assert ended.code == 1
    assert "--ckpt_path last needs --run_dir DIR" in ended.output
    assert "Traceback" not in ended.output


def test_an_evaluation_of_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=1)
    _cut(tmp_path / "run" / "checkpoints" / "last.ckpt")
    arguments = ["validate" if part == "fit" else part for part in tiny_fit("ddp", 1)]
    del arguments[arguments.index("--trainer.max_epochs") :][:2]
    ended = gradsync(*arguments, "--ckpt_path", "run/checkpoints/last.ckpt", cwd=tmp_path)
    assert ended.code == 1
    assert "last.ckpt is damaged" in ended.output
    assert "Traceback" not in ended.output
