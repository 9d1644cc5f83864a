"""The sharded server: in bare loops equal to one process that averages everybody's gradients by hand.

tests/test_equality.py compares it with DDP, tests/test_lifecycle.py has its checkpoints.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, run_distributed
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from training import Mlp, TwoOptimizers, make_data, make_strategy, make_trainer, quiet

from gradsync.comm.buckets import room_for
from gradsync.comm.diagnosis import is_lost_peer
from gradsync.comm.sharded import ShardedServer, make_sharded_server, shared_memory
from gradsync.comm.sharded.layout import cut_anywhere, cut_between
from gradsync.comm.sharded.shared_memory import sum_into
from gradsync.comm.timeline import StepCommunication
from gradsync.errors import UserError

NUM_STEPS = 6
SEVERAL_BUCKETS = 0.001
TRANSPORTS = ["shared_memory", "collective"]


class Net(nn.Module):
    """Odd sizes, a channels-last weight, a scalar, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
        self.first, self.second = nn.Linear(7 * 9, 33), nn.Linear(33, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.conv(images).flatten(1)))) * self.scale


def _loss(net: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return net(torch.randn(4, 3, 5, 5, generator=generator)).square().mean()


class CountingSgd(Optimizer):
    """No torch optimizer: whole parameters of any shape, steps counted per call, the rate by that count."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"count": 0})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    norm = p.grad.norm() + 1e-3
                    self.state[p]["norms"] = [*self.state[p].get("norms", []), float(norm)]
                    p.data.sub_(p.grad / norm, alpha=0.1 / group["count"])


def _grouped(cls: Any, **options: Any) -> Callable[[nn.Module], Optimizer]:
    """Two groups with different settings, neither of them contiguous in a bucket."""

    def make(net: nn.Module) -> Optimizer:
        parameters = list(net.parameters())
        return cls([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.003}], **options)

    return make


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": _grouped(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "sgd_fused": _grouped(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw": _grouped(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw_fused": _grouped(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw_foreach": _grouped(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
    "nadam": _grouped(torch.optim.NAdam),
    "radam": _grouped(torch.optim.RAdam),
    "rmsprop": _grouped(torch.optim.RMSprop, momentum=0.5, centered=True),
    "adagrad": _grouped(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "adadelta": _grouped(torch.optim.Adadelta),
    "adamax": _grouped(torch.optim.Adamax),
    "asgd": _grouped(torch.optim.ASGD),
    "rprop": _grouped(torch.optim.Rprop),
    "adafactor": _grouped(torch.optim.Adafactor),
    "counting": lambda net: CountingSgd(net.parameters()),
}


def _serve(net: nn.Module, optimizer: Optimizer, **options: Any) -> ShardedServer:
    return make_sharded_server(net.named_parameters(), [optimizer], **{"bucket_mib": SEVERAL_BUCKETS, **options})


def _step(server: ShardedServer, net: nn.Module, rank: int, step: int) -> None:
    optimizer = server.optimizers[0]
    optimizer.zero_grad()
    with server.backward_pass():
        _loss(net, rank, step).backward()
    optimizer.step()


def _train(rank: int, world_size: int, kind: str, options: dict[str, Any], steps: int = NUM_STEPS) -> Any:
    """Weights, optimizer state dict (of rank 0), bytes of optimizer state on this rank."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    net = Net()
    optimizer = OPTIMIZERS[kind](net)
    server = _serve(net, optimizer, **options)
    for step in range(steps):
        _step(server, net, rank, step)
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    saved = server.optimizers[0].state_dict()
    server.close()
    return net.state_dict(), saved, held


def _by_hand(world_size: int, kind: str, steps: int = NUM_STEPS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One process, all ranks' gradients, scaled and then added up in rank order."""
    net = Net()
    optimizer = OPTIMIZERS[kind](net)
    used = [p for name, p in net.named_parameters() if "unused" not in name]
    for step in range(steps):
        gradients = [torch.autograd.grad(_loss(net, rank, step), used) for rank in range(world_size)]
        for p, *terms in zip(used, *gradients, strict=True):
            p.grad = torch.empty_like(p)
            p.grad.copy_(sum(term * (1.0 / world_size) for term in terms))
        optimizer.step()
    return net.state_dict(), optimizer.state_dict()


def _assert_same(a: Any, b: Any) -> None:
    """Trees of dicts, lists and tensors; tensors also in strides."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


# -- who owns what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("numels", [[1], [15], [16, 17], [5, 1000, 3], [7, 7, 7, 12345]])
def test_slices_cover_the_bucket_once_and_cut_tensors_at_whole_vectors(numels: list[int], world_size: int) -> None:
    slices, total = cut_anywhere(numels, 4, world_size), sum(numels)
    assert [i for start, end in slices for i in range(start, end)] == list(range(total))
    ends = [0, *itertools.accumulate(numels)]
    for start, _ in slices:
        assert (start - max(end for end in ends if end <= start)) % 16 == 0
    assert max(end - start for start, end in slices) <= total / world_size + 16


def test_whole_tensors_are_dealt_out_as_evenly_as_they_allow() -> None:
    numels, loads = [30, 1, 1, 40, 5, 25], [0, 0]
    slices = cut_between(numels, loads)
    bounds = {0, 30, 31, 32, 72, 77, 102}
    assert sorted(slices) == [(0, 32), (32, 102)] or sorted(slices) == [(0, 72), (72, 102)]
    assert {bound for part in slices for bound in part} <= bounds
    assert cut_between([100], [7, 3, 5])[1] == (0, 100), "one tensor goes to the rank that has least"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_every_owner_adds_up_in_rank_order(world_size: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(1000) * 10**rank for rank in range(world_size)]
    expected = sum(given[1:], given[0])
    for own in range(world_size):
        terms = [term.clone() for term in given]
        sum_into(terms, own, torch.empty(1000))
        assert torch.equal(terms[own], expected)
        assert all(torch.equal(terms[r], given[r]) for r in range(world_size) if r != own)


# -- equal to one process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_optimizer_state_equal_those_of_one_process_to_the_bit(kind: str) -> None:
    weights, state = _by_hand(2, kind)
    results = run_distributed(_train, 2, 2, kind, {})
    for found, _, _ in results:
        _assert_same(found, weights)
    _assert_same(results[0][1], state)


@pytest.mark.parametrize("world_size", [1, 3, 5])
@pytest.mark.parametrize("kind", ["adamw", "counting"])
def test_at_any_number_of_ranks_shared_memory_adds_in_rank_order(kind: str, world_size: int) -> None:
    weights, state = _by_hand(world_size, kind)
    results = run_distributed(_train, world_size, world_size, kind, {})
    for found, _, _ in results:
        _assert_same(found, weights)
    _assert_same(results[0][1], state)


@pytest.mark.parametrize("kind", ["sgd", "counting"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_transport_keeps_the_replicas_equal(transport: str, world_size: int, kind: str) -> None:
    weights, _ = _by_hand(world_size, kind)
    results = run_distributed(_train, world_size, world_size, kind, {"transport": transport})
    for found, _, _ in results:
        _assert_same(found, results[0][0])
    for name, value in weights.items():
        torch.testing.assert_close(results[0][0][name], value, rtol=0, atol=1e-6 if world_size > 2 else 0)


@pytest.mark.parametrize(
    "options",
    [{"bucket_mib": 25.0}, {"overlap": False}, {"bucket_mib": 1e-5}, {"share_parameters": True}],
    ids=["one", "no_overlap", "tiny", "shared"],
)
def test_buckets_and_overlap_do_not_change_a_bit(options: dict[str, Any]) -> None:
    weights, state = _by_hand(3, "adamw")
    results = run_distributed(_train, 3, 3, "adamw", options)
    _assert_same(results[2][0], weights)
    _assert_same(results[0][1], state)


def test_state_is_divided_by_the_number_of_ranks() -> None:
    numels = {name: p.numel() for name, p in Net().named_parameters()}
    whole = 4 * sum(numel for name, numel in numels.items() if "unused" not in name)
    for world_size in (2, 4):
        held = [result[2] for result in run_distributed(_train, world_size, world_size, "sgd", {"bucket_mib": 25.0})]
        assert sum(held) == whole
        assert max(held) <= 4 * sum(numels.values()) / world_size + 64


def _count_updates(rank: int) -> Any:
    """Elements that this rank's optimizer steps."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net, stepped = Net(), 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([p.numel() for p in o.param_groups[0]["params"]]))
    seen: list[list[int]] = []
    server = _serve(net, optimizer)
    _step(server, net, rank, 0)
    stepped = sum(map(sum, seen))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    server.close()
    return len(seen), stepped, all(a is b for a, b in zip(held, net.parameters(), strict=True))


def test_hooks_see_one_step_of_the_own_pieces_and_groups_hold_the_modules_parameters() -> None:
    results = run_distributed(_count_updates, 2)
    assert [(calls, holds) for calls, _, holds in results] == [(1, True)] * 2
    assert sum(stepped for _, stepped, _ in results) == sum(p.numel() for p in Net().parameters())


def _counts(rank: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=3)
    net = nn.Linear(4, 4, bias=False)
    optimizer = CountingSgd(net.parameters())
    server = _serve(net, optimizer)
    for _ in range(4):
        server.optimizers[0].zero_grad()
        with server.backward_pass():
            net(torch.ones(2, 4)).sum().backward()
        server.optimizers[0].step()
    return optimizer.param_groups[0]["count"], len(optimizer.state)


def test_an_optimizer_that_counts_its_steps_counts_them_on_ranks_without_a_piece_too() -> None:
    counts, held = zip(*run_distributed(_counts, 3), strict=True)
    assert counts == (4, 4, 4)
    assert sum(held) == 1


# -- order of events -----------------------------------------------------------------------------------------


def _late_into_the_step(rank: int) -> bool:
    """Rank 1 looks at its parameters for a while before it steps."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with server.backward_pass():
        _loss(net, rank, 0).backward()
    before = [p.detach().clone() for p in net.parameters()]
    if rank == 1:
        time.sleep(0.5)
    untouched = all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    server.optimizers[0].step()
    return untouched and not torch.equal(net.first.weight, before[2])


def test_nobody_writes_parameters_of_a_rank_that_has_not_come_to_its_step() -> None:
    assert run_distributed(_late_into_the_step, 2) == [True, True]


def _slow_to_sum(rank: int) -> bool:
    """Rank 1 sums late, while rank 0 already does to its gradients what it likes."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net()
    gradients = [torch.autograd.grad(_loss(net, r, 0), net.first.weight)[0].view(-1) / 2 for r in range(2)]
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    if rank == 1:
        fast = shared_memory.sum_into
        shared_memory.sum_into = lambda *args: (time.sleep(0.1), fast(*args))
    with server.backward_pass():
        _loss(net, rank, 0).backward()
    if rank == 0:
        for p in net.parameters():
            if p.grad is not None:
                p.grad.zero_()
    dist.barrier()
    own = [piece for shard in server._shards for piece in shard.pieces if piece.parameter is net.first.weight]
    expected = gradients[0] + gradients[1]
    return rank == 0 or all(
        torch.equal(piece.gradient, expected[piece.start : piece.start + piece.gradient.numel()]) for piece in own
    )


def test_gradients_may_be_changed_as_soon_as_the_backward_pass_has_ended() -> None:
    assert run_distributed(_slow_to_sum, 2) == [True, True]


# -- gradients -----------------------------------------------------------------------------------------------


def _twice_before_a_step(rank: int, world_size: int, first_syncs: bool) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(0, NUM_STEPS, 2):
        server.optimizers[0].zero_grad()
        if first_syncs:
            with server.backward_pass():
                _loss(net, rank, step).backward()
        else:
            with server.no_sync(), server.backward_pass():
                _loss(net, rank, step).backward()
        with server.backward_pass():
            _loss(net, rank, step + 1).backward()
        server.optimizers[0].step()
    server.close()
    return net.state_dict()


@pytest.mark.parametrize("first_syncs", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_accumulate_also_over_two_averages(world_size: int, first_syncs: bool) -> None:
    net = Net()
    used = [p for name, p in net.named_parameters() if "unused" not in name]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(0, NUM_STEPS, 2):
        total = sum(_loss(net, rank, s) for rank in range(world_size) for s in (step, step + 1)) / world_size
        for p, gradient in zip(used, torch.autograd.grad(total, used), strict=True):
            p.grad = gradient
        optimizer.step()
    for found in run_distributed(_twice_before_a_step, world_size, world_size, first_syncs):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def _clipped(rank: int, algorithm: str) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=3)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=1.0))
    for step in range(NUM_STEPS):
        server.optimizers[0].zero_grad()
        with server.backward_pass():
            _loss(net, rank, step).backward()
        server.optimizers[0].clip(algorithm, 0.01)
        server.optimizers[0].step()
    server.close()
    return net.state_dict()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_the_average_and_the_norm_of_all_of_it(algorithm: str) -> None:
    net = Net()
    used = [p for name, p in net.named_parameters() if "unused" not in name]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(NUM_STEPS):
        gradients = [torch.autograd.grad(_loss(net, rank, step), used) for rank in range(3)]
        for p, *terms in zip(used, *gradients, strict=True):
            p.grad = sum(term * (1.0 / 3) for term in terms)
        if algorithm == "norm":
            torch.nn.utils.clip_grad_norm_(used, 0.01)
        else:
            torch.nn.utils.clip_grad_value_(used, 0.01)
        optimizer.step()
    for found in run_distributed(_clipped, 3, algorithm):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0 if algorithm == "value" else 1e-6)


# -- parameters ----------------------------------------------------------------------------------------------


def _edit(rank: int, replaces_memory: bool) -> Any:
    """Rank 1 changes a parameter that no gradient reaches and all of `first`, in place or by new memory."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    _step(server, net, rank, 0)
    with torch.no_grad():
        if replaces_memory:
            net.first.weight.data = net.first.weight.data.clone().zero_()
        else:
            net.first.weight.zero_()
        if rank == 1:
            net.second.weight.zero_()
    dist.barrier()
    seen = net.first.weight.abs().max().item(), net.second.weight.abs().max().item()
    _step(server, net, rank, 1)
    server.close()
    return seen, net.state_dict()


@pytest.mark.parametrize("replaces_memory", [False, True])
def test_an_edit_of_weights_is_private_and_counts_in_the_next_step(replaces_memory: bool) -> None:
    (seen_0, first), (seen_1, second) = run_distributed(_edit, 2, replaces_memory)
    assert seen_0[1] > 0
    assert (seen_0[0], *seen_1) == (0, 0, 0)
    assert torch.equal(first["first.weight"], second["first.weight"])
    assert 0 < first["first.weight"].abs().max() < 0.05


def _share(rank: int) -> tuple[list[int], float]:
    """Bytes moved by each of two steps; what rank 0 sees of an edit by rank 1."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1), share_parameters=True)
    num_bytes = []
    for step in range(2):
        _step(server, net, rank, step)
        counted = server.timeline.take_step()
        assert counted is not None
        num_bytes.append(counted.num_bytes)
    dist.barrier()
    if rank == 1:
        with torch.no_grad():
            net.scale.fill_(7.0)
    dist.barrier()
    seen = float(net.scale.detach())
    server.close()
    return num_bytes, seen


def test_shared_parameters_move_no_bytes_and_an_edit_is_seen_by_all() -> None:
    """That is the price of it, and why it is off by default."""
    (first, seen_0), (second, seen_1) = run_distributed(_share, 2)
    assert (seen_0, seen_1) == (7.0, 7.0)
    whole = 4 * sum(room_for(p, aligned=True) for p in Net().parameters())
    assert [a + b for a, b in zip(first, second, strict=True)] == [2 * whole] * 2, "gradients only"


def _stale(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=1)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loss = _loss(net, rank, 0)
    _step(server, net, rank, 0)
    loss.backward()


def test_a_backward_pass_through_older_values_is_an_error_as_ever() -> None:
    with pytest.raises(RankFailed, match="modified by an inplace operation"):
        run_distributed(_stale, 1)


def _shared_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:gradsync")


def _let_go(rank: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gc.collect()
    inherited = _shared_maps()  # of pytest's own process, where servers of other tests ran
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    server = _serve(net, optimizer)
    _step(server, net, rank, 0)
    during, saved = _shared_maps() - inherited, server.optimizers[0].state_dict()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    outer = server.optimizers[0]
    server.close()
    del server
    gc.collect()
    _assert_same(net.state_dict(), weights)
    _assert_same(outer.state_dict(), saved)
    return during, _shared_maps() - inherited, [p.is_contiguous() for p in net.parameters()]


def test_nothing_is_shared_after_the_end_and_the_state_is_still_there() -> None:
    for during, afterwards, _ in run_distributed(_let_go, 2):
        assert during == 2
        assert afterwards == 0


def _saved_bytes(rank: int) -> int:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net().bfloat16()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1), bucket_mib=25.0)
    file = io.BytesIO()
    torch.save(net.first.state_dict(), file)
    server.close()
    return file.tell()


def test_a_saved_parameter_does_not_bring_all_of_the_shared_memory_along() -> None:
    own = sum(p.numel() for p in Net().first.parameters()) * 2
    for num_bytes in run_distributed(_saved_bytes, 2):
        assert num_bytes < own + 3000


# -- checkpoints ---------------------------------------------------------------------------------------------


def _resume(rank: int, world_size: int, kind: str, weights: Any, state: Any, first_step: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    net = Net()
    net.load_state_dict(weights)
    server = _serve(net, OPTIMIZERS[kind](net))
    server.optimizers[0].load_state_dict(state)
    for step in range(first_step, NUM_STEPS):
        _step(server, net, rank, step)
    saved = server.optimizers[0].state_dict()
    server.close()
    return net.state_dict(), saved


@pytest.mark.parametrize("kind", ["adamw", "adagrad", "asgd", "rprop", "counting"])
def test_the_state_of_one_process_resumes_sharded_to_the_bit(kind: str) -> None:
    half_weights, half_state = _by_hand(2, kind, NUM_STEPS // 2)
    weights, state = _by_hand(2, kind)
    results = run_distributed(_resume, 2, 2, kind, half_weights, half_state, NUM_STEPS // 2)
    for found, _ in results:
        _assert_same(found, weights)
    _assert_same(results[0][1], state)


def test_state_saved_by_two_ranks_resumes_on_three() -> None:
    """From the same state on, three ranks do as one process that averages three gradients."""
    weights, state, _ = run_distributed(_train, 2, 2, "adamw", {}, 3)[0]
    net = Net()
    net.load_state_dict(weights)
    optimizer = OPTIMIZERS["adamw"](net)
    optimizer.load_state_dict(copy.deepcopy(state))
    used = [p for name, p in net.named_parameters() if "unused" not in name]
    for step in range(3, NUM_STEPS):
        gradients = [torch.autograd.grad(_loss(net, rank, step), used) for rank in range(3)]
        for p, *terms in zip(used, *gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(sum(term * (1.0 / 3) for term in terms))
        optimizer.step()
    results = run_distributed(_resume, 3, 3, "adamw", weights, state, 3)
    _assert_same(results[2][0], net.state_dict())
    _assert_same(results[0][1], optimizer.state_dict())


def _load_foreign(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=1)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1))
    server.optimizers[0].load_state_dict(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1).state_dict())


def test_foreign_optimizer_state_is_refused() -> None:
    with pytest.raises(RankFailed, match="the optimizer state belongs to parameter groups of other sizes"):
        run_distributed(_load_foreign, 1)


# -- figures -------------------------------------------------------------------------------------------------


def _measured(rank: int, world_size: int, transport: str) -> StepCommunication:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 60, bias=False))  # 7504 with what aligns the bias
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1), transport=transport, bucket_mib=25.0)
    timeline = server.timeline
    for _ in range(3):
        server.optimizers[0].zero_grad()
        with server.backward_pass():
            net(torch.ones(2, 64)).sum().backward()
        server.optimizers[0].step()
        step = timeline.take_step()
    server.close()
    assert step is not None
    return step


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counted_bytes_are_what_theory_says(transport: str, world_size: int) -> None:
    """2 (n-1)/n of the data each way, as a ring all-reduce: half in reduce-scatter, half in all-gather."""
    steps = run_distributed(_measured, world_size, world_size, transport)
    total = 4 * 7504 * 4 * (world_size - 1) // world_size
    assert sum(step.num_bytes for step in steps) == total * world_size
    assert all(abs(step.num_bytes - total) <= 64 * world_size * 4 for step in steps)


def test_waiting_within_the_optimizers_step_is_exposed_and_told_apart() -> None:
    for step in run_distributed(_measured, 2, 2, "shared_memory"):
        assert 0 < step.exposed_in_optimizer_ms < step.exposed_ms
        assert step.total_ms > 0


# -- failures ------------------------------------------------------------------------------------------------


def _killed(rank: int, transport: str, when: str) -> Any:
    """Rank 1 ends in mid-step; what rank 0 is told, and whether it comes out of everything."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = Net()
    server = _serve(net, torch.optim.SGD(net.parameters(), lr=0.1), transport=transport, timeout_s=20.0)
    _step(server, net, rank, 0)
    if when == "step":
        with server.backward_pass():
            _loss(net, rank, 1).backward()
    if rank == 1:
        os._exit(0)
    try:
        if when == "step":
            server.optimizers[0].step()
        else:
            _step(server, net, rank, 1)
    except Exception as error:
        server.close()
        return type(error).__name__, str(error), is_lost_peer(error)
    return None


@pytest.mark.parametrize("when", ["backward", "step"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_has_ended_is_noticed_in_every_phase(transport: str, when: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_distributed(_told, 2, transport, when)
    output = str(caught.value)
    assert "is_lost_peer True" in output
    if transport == "shared_memory" and when == "step":
        assert re.search(r"PeerLost rank 1 \(process \d+\) has ended", output)


def _told(rank: int, transport: str, when: str) -> None:
    result = _killed(rank, transport, when)
    assert result is not None
    name, text, lost = result
    raise AssertionError(f"{name} {text} is_lost_peer {lost}")


# -- refusals ------------------------------------------------------------------------------------------------


def _refused(rank: int, what: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dist.barrier()  # rank 0 hosts the store: its refusal must not end the group before the other is in it
    net = Net()
    cls = torch.optim.LBFGS if what == "lbfgs" else torch.optim.SGD
    if what == "unfrozen":
        net.first.requires_grad_(False)
    optimizers: list[Optimizer] = [cls(net.parameters(), lr=0.1)]
    if what == "twice":
        optimizers.append(torch.optim.SGD(net.second.parameters(), lr=0.1))
    server = make_sharded_server(net.named_parameters(), optimizers, SEVERAL_BUCKETS)
    net.first.requires_grad_(True)
    if what == "group":
        server.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    if what == "inner_group":
        optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    _step(server, net, rank, 0)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("lbfgs", "LBFGS evaluates the model again .*: use --trainer.strategy manual_allreduce"),
        ("twice", "a parameter is in two optimizers"),
        ("unfrozen", "parameter 'first.weight' was frozen when the run began .*: use --trainer.strategy manual"),
        ("group", "cannot take a new parameter group in mid-run"),
        ("inner_group", "cannot take a new parameter group in mid-run"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_a_remedy(what: str, text: str) -> None:
    with pytest.raises(RankFailed, match=f"Unshardable: .*{text}") as caught:
        run_distributed(_refused, 2, what)
    assert all(f"[rank {rank}] gradsync.comm.sharded.layout.Unshardable" in str(caught.value) for rank in range(2))


# -- under Lightning -----------------------------------------------------------------------------------------


class _Lbfgs(Mlp):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class _Unfreeze(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        module.net[0].requires_grad_(index >= 2)


def _fit(rank: int, what: str) -> None:
    quiet()
    module = _Lbfgs() if what == "lbfgs" else Mlp()
    module.net[0].requires_grad_(what != "unfreeze")
    options = {"transport": "collective", "share_parameters": True} if what == "share" else {}
    trainer = make_trainer(
        make_strategy("sharded_server", options), 2, callbacks=[_Unfreeze()] if what == "unfreeze" else []
    )
    if what == "scaler":
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu"))
    trainer.fit(module, DataLoader(make_data(64), batch_size=8))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("share", "strategy sharded_server: share_parameters needs transport shared_memory, but it is collective"),
        ("lbfgs", "strategy sharded_server: LBFGS evaluates the model again"),
        ("unfreeze", "parameter 'net.0.weight' was frozen when the run began"),
        ("scaler", "--trainer.precision 16-mixed does not work with --trainer.strategy sharded_server: .*bf16-mixed"),
    ],
)
def test_refusals_of_the_strategy_are_for_people(what: str, text: str) -> None:
    with pytest.raises(RankFailed, match=f"UserError: {text}"):
        run_distributed(_fit, 2, what)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"transport": "pigeon"}, "transport must be one of auto, shared_memory, collective, got 'pigeon'"),
        ({"bucket_mib": 0}, "bucket_mib must be > 0 MiB, got 0"),
        ({"bucket_mib": float("inf")}, "bucket_mib must be > 0 MiB, got inf"),
    ],
)
def test_options_are_checked_before_a_rank_starts(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_strategy("sharded_server", options)


class _TwoInTurn(TwoOptimizers):
    """As adversarial networks are trained: each pass reaches only the parameters of the optimizer whose turn it is."""

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def _in_turn(rank: int, strategy: str, options: dict[str, Any]) -> Any:
    quiet()
    pl.seed_everything(1, verbose=False)
    module = _TwoInTurn()
    trainer = make_trainer(make_strategy(strategy, options), 2)
    trainer.fit(module, DataLoader(make_data(), batch_size=8))
    return dict(module.state_dict())


def test_optimizers_in_turn_equal_ddp_to_the_bit() -> None:
    reference = run_distributed(_in_turn, 2, "ddp", {"find_unused_parameters": True})
    for transport in TRANSPORTS:
        ours = run_distributed(_in_turn, 2, "sharded_server", {"transport": transport, "bucket_mib": SEVERAL_BUCKETS})
        for found, expected in zip(ours, reference, strict=True):
            _assert_same(found, expected)


def _look_at_memory(rank: int) -> Any:
    quiet()
    strategy = make_strategy("sharded_server")
    trainer = make_trainer(strategy, 2, max_steps=4)
    module = Mlp(optimizer="adamw")
    trainer.fit(module, DataLoader(make_data(64), batch_size=8))
    transport, state = strategy.options["transport"], trainer.strategy.optimizer_state(trainer.optimizers[0])
    gc.collect()
    return _shared_maps(), transport, len(state["state"])


def test_a_fit_leaves_no_shared_memory_and_its_optimizer_can_still_be_saved() -> None:
    assert run_distributed(_look_at_memory, 2) == [(0, "shared_memory", 6), (0, "shared_memory", 0)]
