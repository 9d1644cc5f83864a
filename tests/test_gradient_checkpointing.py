"""``--model.gradient_checkpointing``: the same gradients and statistics, with less memory, under every strategy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional
from training import fitted_classifiers

from gradsync.errors import UserError
from gradsync.modules.gradient_checkpointing import checkpoint_activations
from gradsync.modules.networks import build_network

OURS = ["manual_allreduce", "parameter_server", "sharded_server"]


def built(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network(arch, 3, zero_init_residual=False)


def step(net: nn.Module, size: int = 32) -> dict[str, torch.Tensor]:
    """Gradients and buffers after two passes."""
    torch.manual_seed(1)  # dropout's
    for _ in range(2):
        functional.cross_entropy(net(torch.randn(4, 3, size, size)), torch.arange(4) % 3).backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in net.named_parameters()}
    return {name: value for name, value in {**gradients, **dict(net.named_buffers())}.items() if value is not None}


@pytest.mark.parametrize(
    ("arch", "parts", "size"),
    [
        ("resnet18", True, 32),
        ("resnet18", "layer[1234]", 32),
        ("resnet18", "bn1,layer2.0.conv1", 32),
        ("vgg11_bn", "features,classifier", 32),  # with dropout
        ("densenet121", "features.denseblock*", 32),
        ("convnext_tiny", "features.*", 32),
        ("swin_t", "features.?", 32),
        ("vit_b_16", "encoder.layers.*", 224),
    ],
)
def test_gradients_and_statistics_are_equal_to_the_bit(arch: str, parts: str | bool, size: int) -> None:
    net, plain = built(arch), built(arch)
    checkpoint_activations(net, parts)
    ours, reference = step(net, size), step(plain, size)
    assert ours.keys() == reference.keys()
    assert [name for name in ours if not torch.equal(ours[name], reference[name])] == []


class Counted(nn.Linear):
    calls = 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return super().forward(*args)


def test_the_members_of_a_module_list_are_what_counts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Counted(4, 4) for _ in range(3))

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                value = block(value)
            return value

    net = Net()
    checkpoint_activations(net, "blocks")
    net(torch.ones(1, 4)).sum().backward()
    assert [block.calls for block in net.blocks] == [2, 2, 2]
    with torch.no_grad():  # evaluation keeps nothing anyway
        net(torch.ones(1, 4))
    assert [block.calls for block in net.blocks] == [3, 3, 3]


def test_a_copy_runs_its_own_parts() -> None:
    net = built("resnet18")
    checkpoint_activations(net, True)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert other(torch.ones(2, 3, 32, 32)).abs().sum() > 0
    other(torch.ones(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arch", "parts", "told"),
    [
        ("resnet18", "layer7", "no part 'layer7'; nearest: layer4"),
        ("resnet18", "fc.weight", "fc.weight is a parameter; name modules"),
        ("vit_b_16", True, "true is for ResNets; name the parts of this network, such as encoder.layers.*"),
    ],
)
def test_what_cannot_be_is_refused(arch: str, parts: str | bool, told: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint_activations(built(arch), parts)
    assert str(caught.value).startswith("--model.gradient_checkpointing")
    assert told in str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp", *OURS])
def test_weights_and_bytes_are_those_of_a_run_without(strategy: str) -> None:
    for (ours, ours_bytes), (plain, plain_bytes) in zip(
        fitted_classifiers(strategy, gradient_checkpointing=True),
        fitted_classifiers(strategy, gradient_checkpointing=False),
        strict=True,
    ):
        assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []
        assert ours_bytes == plain_bytes


def activation_mib(rank: int, parts: str | bool) -> float:
    """What torch counts as activations when a step of ResNet-50 takes most memory, two images of 224 pixels."""
    net = build_network("resnet50", 10, zero_init_residual=True)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that the peak is that of activations
    checkpoint_activations(net, parts)
    tracker = MemTracker()
    tracker.track_external(net)
    images = torch.randn(2, 3, 224, 224)
    with tracker:
        net(images).sum().backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    return next(num_bytes for kind, num_bytes in peak.items() if str(kind).endswith("ACT")) / 2**20


def test_activations_of_resnet50_take_less_memory() -> None:
    [plain], [stages], [blocks] = (run_distributed(activation_mib, 1, parts) for parts in (False, "layer[1234]", True))
    assert plain > 100
    assert blocks <= 0.6 * plain
    assert blocks < stages < plain
