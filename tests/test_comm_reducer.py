"""The reducer alone, in bare loops: no Lightning in the ranks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, run_distributed
from torch import nn

from gradsync.comm import GradientReducer, NaiveAllReduce, NativeAllReduce
from gradsync.comm.broadcast import broadcast_tensors


def _groups(rank: int, world_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    return dist.new_group(), dist.new_group()  # pyright: ignore[reportReturnType]


def _reduce_random(rank: int, world_size: int, naive: bool, bucket_mib: float, overlap: bool) -> Any:
    gradients, control = _groups(rank, world_size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1), nn.Linear(1, 5)).double()
    model[2].float()
    algorithm = (NaiveAllReduce if naive else NativeAllReduce)(gradients)
    reducer = GradientReducer(model.named_parameters(), algorithm, control, bucket_mib, overlap=overlap)
    torch.manual_seed(100 + rank)
    with reducer.backward_pass():
        hidden = model[1](model[0](torch.randn(8, 20, dtype=torch.float64)))
        model[3](model[2](hidden.float()).double()).square().sum().backward()
    averaged = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    reducer.close()
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(100 + rank)
    hidden = model[1](model[0](torch.randn(8, 20, dtype=torch.float64)))
    model[3](model[2](hidden.float()).double()).square().sum().backward()
    return averaged, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("naive", "bucket_mib", "overlap"), [(True, 25, False), (False, 25, True), (False, 1e-4, True)]
)
def test_the_average_of_mixed_dtypes_is_exact_within_rounding(
    world_size: int, naive: bool, bucket_mib: float, overlap: bool
) -> None:
    results = run_distributed(_reduce_random, world_size, world_size, naive, bucket_mib, overlap)
    for index, averaged in enumerate(results[0][0]):
        local = torch.stack([result[1][index].double() for result in results])
        eps = torch.finfo(averaged.dtype).eps
        # every term is scaled once and added at most world_size times, each with a relative error of eps
        bound = 4 * world_size * eps * local.abs().sum(0) / world_size
        assert bool(((averaged.double() - local.mean(0)).abs() <= bound).all())
        assert all(torch.equal(averaged, result[0][index]) for result in results)


def _used_on_one_rank(rank: int) -> Any:
    gradients, control = _groups(rank, 2)
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    reducer = GradientReducer(layers.named_parameters(), NativeAllReduce(gradients), control)
    used = layers[1] if rank == 0 else layers[0]  # layer 2: on no rank
    with reducer.backward_pass():
        (layers[0](torch.ones(3)) + used(torch.ones(3))).sum().backward()
    return [None if layer.bias.grad is None else layer.bias.grad.tolist() for layer in layers]


def test_a_parameter_used_on_one_rank_is_averaged_and_one_used_on_none_stays_without_gradient() -> None:
    # rank 0: layer 0 once and layer 1 once; rank 1: layer 0 twice
    assert run_distributed(_used_on_one_rank, 2) == [[[1.5] * 3, [0.5] * 3, None]] * 2


def _accumulate(rank: int) -> Any:
    gradients, control = _groups(rank, 2)
    weight = nn.Parameter(torch.zeros(4))
    reducer = GradientReducer([("weight", weight)], NativeAllReduce(gradients), control)
    with reducer.no_sync(), reducer.backward_pass():
        (weight * (rank + 1)).sum().backward()
    local = weight.grad.tolist()
    with reducer.backward_pass():
        (weight * 10).sum().backward()
    return local, weight.grad.tolist(), reducer.timeline.take_step().num_bytes


def test_no_sync_accumulates_and_the_next_pass_averages_all() -> None:
    first, second = run_distributed(_accumulate, 2)
    assert (first[0], second[0]) == ([1.0] * 4, [2.0] * 4)
    assert first[1] == second[1] == [11.5] * 4
    assert first[2] == 4 * 4 * 2  # 16 bytes: half of it twice each way in a ring of two


def _sparse(rank: int) -> None:
    gradients, control = _groups(rank, 2)
    embedding = nn.Embedding(5, 2, sparse=True)
    reducer = GradientReducer(embedding.named_parameters(), NativeAllReduce(gradients), control)
    with reducer.backward_pass():
        embedding(torch.tensor([1])).sum().backward()


def test_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(RankFailed, match="parameter 'weight' has a sparse gradient"):
        run_distributed(_sparse, 2)


def _broadcast(rank: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=3)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(rank), torch.full((2, 2, 2, 2), rank + 0.5)]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    broadcast_tensors(tensors, src=1)
    dist.barrier()  # who leaves early would break off what is still on its way to others
    return [tensor.sum().item() for tensor in tensors], tensors[2].is_contiguous(memory_format=torch.channels_last)


def test_broadcast_gives_all_ranks_the_tensors_of_one() -> None:
    assert run_distributed(_broadcast, 3) == [([6.0, 1, 24.0], True)] * 3


def test_the_engine_itself_imports_no_lightning() -> None:
    """Only the package's ``__init__`` does, to register the strategies; ``comm`` works on its own."""
    script = (
        "import sys, types, pathlib, importlib.util\n"
        "root = pathlib.Path(importlib.util.find_spec('gradsync').origin).parent\n"
        "package = types.ModuleType('gradsync'); package.__path__ = [str(root)]\n"
        "sys.modules['gradsync'] = package\n"
        "import gradsync.comm, gradsync.comm.server, gradsync.comm.sharded, gradsync.comm.diagnosis\n"
        "assert not [name for name in sys.modules if 'lightning' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
