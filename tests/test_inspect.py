"""``gradsync inspect``: every parameter of a model, from wherever it comes, without training."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from inspecting import records, refusal, shown, write_llama
from torch import nn
from torchvision import models

from gradsync import cli
from gradsync.inspection import find_model, module_entries
from gradsync.inspection.entries import module_notes
from gradsync.inspection.sizes import short_count, size
from gradsync.inspection.statistics import statistics_of

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


class Peculiar(pl.LightningModule):
    """One of each kind of tensor that is not simply a trainable parameter."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width, sparse=True)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)


# -- where models come from ----------------------------------------------------------------------------------


def test_llama_2_7b_is_listed_and_takes_no_memory(tmp_path: Path) -> None:
    listing = find_model(str(write_llama(tmp_path / "llama")))
    assert len(listing.entries) == 291
    assert sum(entry.count for entry in listing.entries) == 6_738_415_616
    assert listing.module is not None
    assert all(tensor.is_meta for tensor in (*listing.module.parameters(), *listing.module.buffers()))
    output = shown(tmp_path / "llama")
    assert "291 parameters, 6,738,415,616 (6.74 B), 25.10 GiB, float32\ntrainable: all\n" in output
    assert sum(line.startswith(("model.", "lm_head.")) for line in output.splitlines()) == 291


@pytest.mark.parametrize("arch", ["resnet50", "torchvision:resnet50"])
def test_torchvisions_networks_are_those_that_it_builds(arch: str) -> None:
    with torch.device("meta"):
        network = models.resnet50()
    wanted = [(name, list(p.shape), p.numel()) for name, p in network.named_parameters()]
    found = records(arch)
    assert [(r["name"], r["shape"], r["count"]) for r in found] == wanted
    assert {(r["dtype"], r["trainable"]) for r in found} == {("float32", True)}


def test_networks_with_a_backbone_are_not_downloaded() -> None:
    assert len(find_model("fasterrcnn_resnet50_fpn").entries) > 100


def test_timms_networks() -> None:
    listing = find_model("timm:vit_tiny_patch16_224")
    assert sum(entry.count for entry in listing.entries) == 5_717_416
    assert find_model("vit_tiny_patch16_224").entries == listing.entries


def test_hugging_face_by_folder_and_by_file(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny", **TINY)
    assert records(folder) == records(folder / "config.json") == records(f"hf:{folder}")
    assert "vocab_size: 100" in shown(folder, "--config")


def test_a_dtype_of_the_configuration_is_that_of_the_parameters(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny", **TINY)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "torch_dtype": "bfloat16"}))
    assert {record["dtype"] for record in records(folder)} == {"bfloat16"}


def test_a_configuration_of_fit_with_more_arguments(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  class_path: gradsync.modules.ImageClassifier\n  init_args: {arch: resnet18}\n")
    found = records(config, "--", "--model.num_classes", 7)
    assert found[-1]["name"] == "net.fc.bias"
    assert found[-1]["shape"] == [7]
    built_with = yaml.safe_load(shown(config, "--config", "--", "--model.num_classes", 7))
    assert built_with["model"]["init_args"]["arch"] == "resnet18"


def test_what_only_data_can_tell_is_learnt_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled images have ten classes."""
    monkeypatch.setenv("GRADSYNC_CACHE", str(tmp_path))
    assert records("--", "--model.arch", "resnet18")[-1]["shape"] == [10]


def test_any_lightning_module_by_its_path() -> None:
    found = records("test_inspect.Peculiar", "--", "--model.width", 6)
    assert [record["name"] for record in found if not record["trainable"]] == ["frozen.weight", "frozen.bias"]
    assert found[0]["shape"] == [10, 6]


def test_a_model_that_looks_at_its_values_is_built_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def looking() -> nn.Module:
        return nn.Linear(2, int(torch.ones(3).sum().item()))

    monkeypatch.setattr("torchvision.models.get_model", lambda name, **options: looking())
    assert records("resnet18")[0]["shape"] == [3, 2]


# -- what is unusual -----------------------------------------------------------------------------------------


def test_tied_sparse_and_buffer_tensors_get_a_line_each() -> None:
    output = shown("test_inspect.Peculiar")
    assert "tied: embedding.weight is also head.weight; one tensor, counted once" in output
    assert "sparse gradients: embedding; our strategies send dense ones only (sparse=False)" in output
    assert "buffers: 3, 40 B (norm.running_mean, norm.running_var, norm.num_batches_tracked)" in output
    assert "5 parameters, 68 (68), 272 B, float32\ntrainable: 48 (48), 192 B, float32\nfrozen: 20 (20)" in output
    assert [r["tied"] for r in records("test_inspect.Peculiar")][:2] == [["head.weight"], []]


def test_a_sparse_parameter_is_as_large_as_what_it_stores() -> None:
    module = nn.Module()
    module.table = nn.Parameter(torch.eye(8).to_sparse())
    module.lazy = nn.LazyLinear(3)
    sparse, *lazy = module_entries(module)
    assert (sparse.count, sparse.num_bytes, sparse.is_sparse) == (64, 8 * (2 * 8 + 4), True)
    assert [entry.shape for entry in lazy] == [None, None]
    notes = "\n".join(module_notes(module))
    assert "sparse: table: counted with zeros, sized by what is stored; no strategy can send it" in notes
    assert "without a shape before the first batch: lazy.weight, lazy.bias; not counted" in notes
    assert statistics_of(module.table.detach()) == statistics_of(torch.eye(8))


# -- views ---------------------------------------------------------------------------------------------------


def test_a_filter_is_part_of_a_name_or_a_pattern() -> None:
    assert len(records("resnet18", "--filter", "layer4")) == 15
    assert [r["name"] for r in records("resnet18", "--filter", "fc.*")] == ["fc.weight", "fc.bias"]
    assert "2 of 62 parameters" in shown("resnet18", "--filter", "fc.")
    said = refusal("resnet18", "--filter", "layr4")
    assert said.startswith(
        "--filter layr4: no parameter of resnet18 of torchvision has that in its name; nearest: layer4"
    )


def test_the_tree_adds_up() -> None:
    rows = [line.split() for line in shown("resnet18", "--children", "--depth", 1).splitlines()]
    top = [row for row in rows[2:] if len(row) == 7]
    assert [row[0] for row in top] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sum(int(row[3].replace(",", "")) for row in top) == int(rows[1][2].replace(",", "")) == 11_689_512
    assert "    0     BasicBlock" in shown("resnet18", "--children")


def test_values_are_those_of_the_tensors() -> None:
    found = records("test_inspect.Peculiar", "--values")
    ones, zeros = (next(r for r in found if r["name"] == f"norm.{name}") for name in ("weight", "bias"))
    assert [ones[key] for key in ("mean", "std", "min", "max", "zeros")] == [1, 0, 1, 1, 0]
    assert zeros["zeros"] == 1
    assert "100.0 %" in shown("test_inspect.Peculiar", "--values", "--filter", "norm.bias")


@pytest.mark.parametrize("numel", [1, 1000, 3_000_000])
def test_statistics_by_pieces_equal_those_of_the_whole(numel: int) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(1)) + 1000
    tensor[::7] = 0
    found, whole = statistics_of(tensor), tensor.double()
    assert found.mean == pytest.approx(float(whole.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(whole.std(correction=0)), rel=1e-9)
    assert (found.min, found.max) == (float(tensor.min()), float(tensor.max()))
    assert found.zeros == int((tensor == 0).sum()) / numel


def test_what_is_not_finite_is_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    found = statistics_of(torch.tensor([1.0, math.nan, math.inf, 3.0]))
    assert (found.mean, found.std, found.max, found.num_nonfinite) == (2, 1, 3, 2)
    assert statistics_of(torch.empty(0)).mean is None
    assert statistics_of(torch.tensor([1, 2, 3])).mean == 2
    assert statistics_of(torch.full((2,), 3 + 4j)).max == 5


def test_numbers_for_people() -> None:
    assert [short_count(n) for n in (0, 999, 1000, 999_999, 6_738_415_616)] == ["0", "999", "1 k", "1 M", "6.74 B"]
    assert [size(n) for n in (0, 999, 1000, 2**20, 2**31)] == ["0 B", "999 B", "1.0 KiB", "1.0 MiB", "2.00 GiB"]


# -- errors --------------------------------------------------------------------------------------------------


def test_values_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "huge", **{**TINY, "vocab_size": 2**40})
    assert "of memory are available: name a file by --checkpoint" in refusal(folder, "--values")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt50"], r"no model 'resnt50': nearest: resnet50"),
        (["torchvision:resnt50"], r"torchvision has no model 'resnt50'; nearest: resnet50"),
        (["timm:resnt50"], r"timm has no model 'resnt50'; nearest: resnet50"),
        (["no.such.Module"], "fit: Problem with given class_path 'no.such.Module': No module named 'no'"),
        (["--", "--model.no_such_option", "1"], "no model of gradsync fit: "),
        (["nowhere.yaml"], "no such file: /"),
        (["last.ckpt"], "no such file: /"),
        (["resnet18", "--", "--model.arch", "x"], "arguments after -- are those of gradsync fit"),
        (["resnet18", "--json", "--children"], "--json lists parameters, and --children shows something else"),
        (["resnet18", "--values", "--config"], "--values goes with the list of parameters, not with --config"),
        (["resnet18", "--depth", "1"], "--depth is for --children"),
        (["resnet18", "--world-size", "2"], "--world-size is for --buckets"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_folders_without_a_model_and_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder without config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no configuration that transformers knows" in refusal(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing: no configuration that transformers knows" in refusal("nobody/nothing")
    weights = tmp_path / "a.pth"
    weights.touch()
    assert refusal(weights) == f"{weights} holds weights, not a model: gradsync inspect --checkpoint {weights}"


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_package_that_is_missing_is_named_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    model: Any = {"timm": "timm:resnet18", "transformers": write_llama(tmp_path / "tiny", **TINY)}[package]
    assert f"needs the package {package}: pip install {package}" in refusal(model)


def test_the_command_is_known_and_its_errors_take_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "resnet18", "--filter", "nothing"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("gradsync: error: --filter nothing: no parameter of resnet18")
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    cli.main(["inspect", "resnet18", "--filter", "fc.bias"])
    assert "1,000" in capsys.readouterr().out
    assert "inspect" in cli._COMMANDS
    assert sys.modules["transformers"]
