"""``--model.freeze``: parts by name are neither trained nor sent, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import gradsync
from distributed import run_distributed
from torch import nn
from training import fitted_classifiers, train_classifier

from gradsync.errors import UserError
from gradsync.modules import ImageClassifier
from gradsync.modules.freezing import freeze
from gradsync.modules.networks import build_network

OURS = ["manual_allreduce", "parameter_server", "sharded_server"]
ALL_BUT_THE_LAST_STAGE = "conv1,bn1,layer[123]"
LAST_STAGE = ("layer4.", "fc.")


def resnet() -> nn.Module:
    return build_network("resnet18", 3, zero_init_residual=True)


def frozen(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not parameter.requires_grad}


def test_names_and_wildcards_freeze_what_lies_below() -> None:
    net = resnet()
    freeze(net, "conv1, net.bn1,layer[12],layer3.0.conv?.weight")
    expected = {n for n, _ in net.named_parameters() if n.startswith(("conv1.", "bn1.", "layer1.", "layer2."))}
    assert frozen(net) == expected | {"layer3.0.conv1.weight", "layer3.0.conv2.weight"}


def test_batch_norm_of_frozen_parts_only_is_held() -> None:
    net = resnet()
    norms = freeze(net, "layer1,layer2.0.bn1.weight,layer2.0.bn2.*")
    assert norms == ["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2", "layer2.0.bn2"]


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ("conv1,layer9", "no part 'layer9'; nearest: layer4"),
        ("conv1,", "no part ''; its parts: conv1, bn1"),
        ("zzz*", "no part 'zzz*'"),
        ("*", "leaves nothing to be trained"),
    ],
)
def test_what_cannot_be_is_refused(patterns: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        freeze(resnet(), patterns)
    assert str(caught.value).startswith("--model.freeze")
    assert told in str(caught.value)


def test_modes_of_frozen_and_unfrozen_batch_norm() -> None:
    module = ImageClassifier("resnet18", num_classes=3, freeze="bn1")
    module.configure_model()
    net: Any = nn.SyncBatchNorm.convert_sync_batchnorm(module).net  # as --trainer.sync_batchnorm does
    assert (net.bn1.training, net.layer1[0].bn1.training) == (False, True)
    module.eval()
    module.train()
    assert (net.bn1.training, net.layer1[0].bn1.training) == (False, True)
    net.bn1.requires_grad_(True)  # as a callback does that unfreezes it in mid-run
    assert module.train() is module
    assert net.bn1.training


@pytest.mark.parametrize("decay_norms_and_biases", [True, False])
def test_the_optimizer_holds_what_is_trained(decay_norms_and_biases: bool) -> None:
    module = ImageClassifier(
        "resnet18", num_classes=3, freeze="*bn*,*downsample*,*.bias", decay_norms_and_biases=decay_norms_and_biases
    )
    module.configure_model()
    optimizer = module.optimizer(module._parameter_groups())
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {parameter for parameter in module.parameters() if parameter.requires_grad}
    assert len(optimizer.param_groups) == 1  # nothing of one dimension is left


@pytest.mark.parametrize("strategy", OURS)
def test_trains_and_sends_the_rest(strategy: str) -> None:
    net = resnet()
    all_bytes = sum(parameter.nbytes for parameter in net.parameters())
    rest = sum(parameter.nbytes for name, parameter in net.named_parameters() if name.startswith(LAST_STAGE))
    for ours, reference in zip(
        fitted_classifiers(strategy, freeze=ALL_BUT_THE_LAST_STAGE),
        fitted_classifiers("ddp", freeze=ALL_BUT_THE_LAST_STAGE),
        strict=True,
    ):
        state, num_bytes = ours
        assert all(torch.equal(value, reference[0][name]) for name, value in state.items())
        whole = fitted_classifiers(strategy, freeze=None)[0][1]
        # Slices of sharded_server are padded to a multiple of the ranks' number.
        assert num_bytes == pytest.approx([step * rest / all_bytes for step in whole], rel=0, abs=64)


def test_what_is_frozen_stays_as_it_is_statistics_too() -> None:
    [(before, _)] = run_distributed(train_classifier, 1, "ddp", 1, {}, {"max_steps": 0})
    after, _ = fitted_classifiers("manual_allreduce", freeze=ALL_BUT_THE_LAST_STAGE)[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("net.layer4.", "net.fc."))}


def test_an_unknown_part_is_one_error_of_the_command(tmp_path: Path) -> None:
    ended = gradsync("fit", "--model.freeze", "layer9", "--trainer.devices", "1", cwd=tmp_path)
    assert ended.code == 1
    assert ended.output.count("--model.freeze: the network has no part 'layer9'; nearest: layer4") == 1
    assert "Traceback" not in ended.output
