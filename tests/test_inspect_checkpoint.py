"""``gradsync inspect --checkpoint``: what is in a file, whatever its size, and never any code of it."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import run_distributed
from inspecting import records, refusal, shown
from safetensors.torch import save_file
from torch import nn
from torch.serialization import skip_data
from torch.utils.data import DataLoader
from torchvision import models
from training import Mlp, make_data, make_trainer, quiet

from gradsync.inspection import list_file

_GIB = 2**30


def _network() -> nn.Module:
    torch.manual_seed(3)
    return models.resnet18(num_classes=5)


def _saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {
        "net.0.weight": torch.arange(6.0).view(2, 3),
        "net.0.bias": torch.tensor([0.0, 1.0]),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_plain_and_wrapped_weights(state: dict[str, Any], wrapper: str | None, tmp_path: Path) -> None:
    path = _saved(tmp_path / "a.pth", {wrapper: state, "epoch": 3} if wrapper else state)
    found = records("--checkpoint", path, "--values")
    assert [(r["name"], r["shape"], r["dtype"]) for r in found] == [
        ("net.0.weight", [2, 3], "float32"),
        ("net.0.bias", [2], "float32"),
        ("steps", [], "int64"),
    ]
    assert [r["mean"] for r in found] == [2.5, 0.5, 7]
    assert {r["trainable"] for r in found} == {None}


def test_torchs_old_format_is_read_with_a_line_about_it(state: dict[str, Any], tmp_path: Path) -> None:
    path = _saved(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False)
    assert "old.pth is of torch's old format, which cannot be mapped: it was read as a whole" in shown(
        "--checkpoint", path
    )


def test_safetensors_and_an_index_of_several(state: dict[str, Any], tmp_path: Path) -> None:
    weight, bias, steps = state.items()
    save_file(dict([weight]), tmp_path / "1.safetensors", {"format": "pt"})
    save_file(dict([bias, steps]), tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    parts = {weight[0]: "1.safetensors", bias[0]: "2.safetensors", steps[0]: "2.safetensors"}
    index.write_text(json.dumps({"weight_map": parts}))
    assert {r["name"]: r["mean"] for r in records("--checkpoint", index, "--values")} == {
        "net.0.weight": 2.5,
        "net.0.bias": 0.5,
        "steps": 7,
    }
    assert yaml.safe_load(shown("--checkpoint", tmp_path / "1.safetensors", "--config")) == {"format": "pt"}
    (tmp_path / "2.safetensors").unlink()
    assert "no such file: " in refusal("--checkpoint", index)


def test_tied_and_sparse_tensors_of_a_file(tmp_path: Path) -> None:
    shared = torch.ones(4)
    path = _saved(tmp_path / "a.pth", {"a": shared, "b": shared, "c": torch.eye(3).to_sparse(), "d": shared[:2]})
    found = {r["name"]: r for r in records("--checkpoint", path, "--values")}
    assert found["a"]["tied"] == ["b"]
    assert found["c"]["sparse"]
    assert found["c"]["zeros"] == pytest.approx(2 / 3)
    assert found.keys() == {"a", "c", "d"}
    assert "tied: a is also b; one tensor, counted once" in shown("--checkpoint", path)


def _fit(rank: int, folder: str) -> None:
    quiet()
    trainer = make_trainer("auto", 1, max_steps=2, default_root_dir=folder)
    trainer.fit(Mlp(batch_norm=True), DataLoader(make_data(), batch_size=8))
    trainer.save_checkpoint(f"{folder}/last.ckpt")


def test_a_checkpoint_of_lightning_with_its_model(tmp_path: Path) -> None:
    """What is a buffer, the model says."""
    run_distributed(_fit, 1, str(tmp_path))
    path = tmp_path / "last.ckpt"
    alone, with_model = (records("--checkpoint", path, *model) for model in ([], ["training.Mlp", "--", *_WITH_NORM]))
    assert len(alone) == 11
    assert "net.1.running_mean" in {r["name"] for r in alone}
    assert len(with_model) == 8
    assert all(r["trainable"] for r in with_model)
    assert yaml.safe_load(shown("--checkpoint", path, "--config"))["global_step"] == 2
    assert "a Lightning checkpoint: 11 tensors" in shown("--checkpoint", path)


_WITH_NORM = ["--model.batch_norm", "true"]


def test_the_names_of_a_wrapped_model_match(tmp_path: Path) -> None:
    network = _network()
    plain = _saved(tmp_path / "plain.pth", network.state_dict())
    wrapped = {f"module.net.{name}": value for name, value in network.state_dict().items()}
    model = ["--", "--model.arch", "resnet18", "--model.num_classes", "5"]
    wanted = network.fc.weight.double().mean().item()
    for path in (plain, _saved(tmp_path / "wrapped.pth", wrapped)):
        found = records("--values", "--checkpoint", path, "--filter", "fc.weight", *model)
        assert found[0]["mean"] == pytest.approx(wanted)
        assert found[0]["name"] == "net.fc.weight"


# -- what is refused -----------------------------------------------------------------------------------------


def test_a_file_of_another_model_is_named_with_the_first_difference(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a.pth", _network().state_dict())
    said = refusal("resnet18", "--checkpoint", path)
    assert said == (
        "--checkpoint: a.pth, a file of torch, is of another model than resnet18 of torchvision: "
        "2 have another shape, first fc.weight: [5, 512] instead of [1000, 512]"
    )
    said = refusal("resnet34", "--checkpoint", path)
    assert "it lacks 48 of 110 parameters, first layer1.2.conv1.weight" in said
    assert "that the model has not" in refusal("vgg11", "--checkpoint", path)


class _Code:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = {"state_dict": {"a": torch.ones(2)}, "extra": _Code(mark)}
    zipped, old = tmp_path / "zipped.ckpt", tmp_path / "old.pth"
    _saved(zipped, content)
    _saved(old, content, _use_new_zipfile_serialization=False)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(_Code(mark), protocol=2))
    for path in (zipped, old, bare):
        said = refusal("--checkpoint", path, "--values")
        assert "holds more than tensors (posix.mkdir), which only running code from the file could make" in said
    module = _saved(tmp_path / "module.pt", nn.Linear(2, 2))
    assert "holds more than tensors (torch.nn.modules.linear.Linear)" in refusal("--checkpoint", module)
    bare.write_bytes(pickle.dumps(_Code(mark), protocol=4))
    assert "holds more than tensors" in refusal("--checkpoint", bare)
    assert not mark.exists()


def test_damaged_and_foreign_files(state: dict[str, Any], tmp_path: Path) -> None:
    whole = _saved(tmp_path / "whole.ckpt", state).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02garbage")
    (tmp_path / "cut.safetensors").write_bytes(b'\x80\0\0\0\0\0\0\0{"a":')
    (tmp_path / "some.index.json").write_text("[]")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a", "b")
    _saved(tmp_path / "list.pth", [torch.ones(2)])
    _saved(tmp_path / "nothing.pth", {"epoch": 1, "lr": 0.1})
    wanted = {
        "cut.ckpt": "cut.ckpt is damaged or cut short (PytorchStreamReader failed reading zip archive",
        "empty.pth": "is no file of torch or safetensors: it is empty",
        "text.pth": "is no file of torch or safetensors: its first bytes are of neither",
        "pickle.pth": "pickle.pth holds more than tensors (or is damaged), which only",
        "other.pth": "other.pth is damaged or cut short (",
        "cut.safetensors": "is damaged, or no safetensors file (",
        "some.index.json": "is no index of weights: it has no weight_map",
        "list.pth": "holds a list, wanted a state dict (names to tensors)",
        "nothing.pth": "holds no tensors by name: it has epoch, lr",
        "none.pth": f"--checkpoint: no such file: {tmp_path / 'none.pth'}",
        "": f"--checkpoint {tmp_path} is a folder: name a file of weights in it; it has cut.ckpt, cut.safetensors, ",
    }
    for name, message in wanted.items():
        assert message in refusal("--checkpoint", tmp_path / name), name


@pytest.mark.parametrize("seed", range(60))
def test_a_file_with_flipped_bytes_is_listed_or_refused(seed: int, tmp_path: Path) -> None:
    """Never another error, a traceback or a crash."""
    path = _saved(tmp_path / "a.ckpt", {"state_dict": _network().fc.state_dict(), "hyper_parameters": {"width": 3}})
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(len(content), (1 + seed % 8,), generator=generator).tolist():
        content[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    path.write_bytes(content)
    try:
        shown("--checkpoint", path)
    except Exception as error:
        assert type(error).__name__ == "UserError", error  # noqa: PT017


def test_safetensors_that_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "safetensors" else find(name))
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    said = refusal("--checkpoint", tmp_path / "a.safetensors")
    assert said.endswith("needs the package safetensors: pip install safetensors")


# -- memory --------------------------------------------------------------------------------------------------


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _list_measured(rank: int, path: str) -> tuple[int, int]:
    before = _peak_kib()
    assert rank == 0
    listing = list_file(Path(path))
    assert sum(entry.num_bytes for entry in listing.entries) == 8 * _GIB
    return len(listing.entries), _peak_kib() - before


def _eight_gib_of_torch(path: Path) -> None:
    """The tensors' memory is never touched, and the file has holes in their place."""
    state = {f"layers.{number}.weight": torch.empty(_GIB // 4) for number in range(8)}
    with skip_data():
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, path)


def _eight_gib_of_safetensors(path: Path) -> None:
    header = {
        f"layers.{n}.weight": {"dtype": "F16", "shape": [_GIB // 2], "data_offsets": [n * _GIB, (n + 1) * _GIB]}
        for n in range(8)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 8 * _GIB)


@pytest.mark.parametrize("make", [_eight_gib_of_torch, _eight_gib_of_safetensors])
def test_eight_gib_are_listed_in_constant_memory(make: Any, tmp_path: Path) -> None:
    path = tmp_path / ("big.ckpt" if make is _eight_gib_of_torch else "big.safetensors")
    make(path)
    assert path.stat().st_size > 8 * _GIB
    assert sys.modules["safetensors"]  # imported before memory is looked at
    [(num, grown_kib)] = run_distributed(_list_measured, 1, str(path))
    assert num == 8
    assert grown_kib < 64 * 1024
