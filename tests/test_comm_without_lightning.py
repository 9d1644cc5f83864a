"""The engine on its own, and in plain DDP: bare loops and other people's frameworks, equal to DDP to the bit."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gradsync.comm import ALGORITHMS, BadHook, ModelMismatch, as_ddp_hook, make_algorithm, make_reducer, reducer_for
from gradsync.comm.hooks import Int8State, int8_hook
from gradsync.comm.tuner import CANDIDATES_MIB

SMALL_CAP_MIB = 0.01
"""Several buckets for the model below. At most DDP's first bucket (1 MiB), so that both cut alike."""
PLUGGABLE = [name for name in ("native", "ring", "halving_doubling", "shared_memory") if name in ALGORITHMS]


def _run(fn: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    def start(rank: int) -> Any:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        torch.manual_seed(rank)  # rank 0's model has to win
        return fn(rank, *args)

    return run_distributed(start, world_size)


def _model(width: int = 64) -> nn.Sequential:
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(20, width), nn.LayerNorm(width), *layers, nn.Linear(width, 5))


def _train(
    net: nn.Module,
    forward: nn.Module,
    num_steps: int,
    backward_pass: Callable[[], Any] = contextlib.nullcontext,
    autocast: bool = False,
) -> list[Tensor]:
    """The weights of ``net`` after steps on data that differ between ranks, but not between two calls."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    for _ in range(num_steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(torch.randn(16, 20, generator=generator)).square().mean()
        with backward_pass():
            loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    assert len(a) == len(b) > 0
    return all(map(torch.equal, a, b))


# -- a bare loop -------------------------------------------------------------------------------------------------


def _bare_loop(rank: int, num_steps: int, width: int, autocast: bool, options: dict[str, Any]) -> Any:
    """Like DDP with its default buckets."""
    ours, theirs = (_model(width) for _ in range(2))
    initial = [p.detach().clone() for p in ours.parameters()]
    theirs.load_state_dict(ours.state_dict())
    reference = _train(theirs, DistributedDataParallel(theirs), num_steps, autocast=autocast)
    reducer = reducer_for(ours, **options)
    trained = _train(ours, ours, num_steps, reducer.backward_pass, autocast)
    num_buckets = len(reducer.buckets)
    reducer.close()
    return _same(trained, reference), _same(trained, initial), num_buckets


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16_autocast"])
@pytest.mark.parametrize("options", [{}, {"algorithm": "native"}], ids=["auto", "native"])
def test_a_bare_loop_is_bitwise_equal_to_ddp(autocast: bool, options: dict[str, Any]) -> None:
    assert _run(_bare_loop, 5, 64, autocast, options) == [(True, False, 1)] * 2


@pytest.mark.parametrize("world_size", [3, 4])
def test_native_rounds_as_ddp_does_at_more_ranks(world_size: int) -> None:
    """The order of a sum depends on the buckets, so these have to be DDP's own."""
    results = _run(_bare_loop, 4, 400, False, {"algorithm": "native"}, world_size=world_size)
    assert results == [(True, False, 2)] * world_size


# -- our algorithms as hooks of DDP ------------------------------------------------------------------------------


def _as_hook(rank: int, name: str, bucket_cap_mib: float | None) -> Any:
    ours = _model()
    theirs = deepcopy(ours)
    plain, hooked = (DistributedDataParallel(net, bucket_cap_mb=bucket_cap_mib) for net in (theirs, ours))
    algorithm, _ = make_algorithm(name, dist.new_group(), list(ours.parameters()), timeout_s=30)
    calls = []
    hook = as_ddp_hook(algorithm)

    def counted(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(bucket.index())
        return hook(state, bucket)

    counted.__annotations__ = hook.__annotations__
    hooked.register_comm_hook(None, counted)
    equal = _same(_train(ours, hooked, 5), _train(theirs, plain, 5))
    algorithm.close()
    return equal, calls.count(max(calls)), max(calls)


@pytest.mark.parametrize("name", PLUGGABLE)
@pytest.mark.parametrize("bucket_cap_mib", [None, SMALL_CAP_MIB], ids=["default", "small"])
def test_an_algorithm_as_a_hook_is_bitwise_equal_to_ddp_without(name: str, bucket_cap_mib: float | None) -> None:
    for equal, num_calls, last_index in _run(_as_hook, name, bucket_cap_mib):
        assert equal
        # small: DDP has one bucket in the first step, and lays out anew for the second
        assert (num_calls, last_index > 1) == ((5, False) if bucket_cap_mib is None else (4, True))


def _under_accelerate(rank: int, name: str) -> Any:
    os.environ["RANK"] = str(rank)
    from accelerate import Accelerator, PartialState

    PartialState(cpu=True)
    accelerator = Accelerator(cpu=True)
    ours, theirs = (_model() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    reference = _train(theirs, DistributedDataParallel(theirs), 5)
    wrapped = accelerator.prepare(ours)
    assert isinstance(wrapped, DistributedDataParallel)
    if name == "int8":
        wrapped.register_comm_hook(Int8State(named_parameters=ours.named_parameters()), int8_hook)
        trained = _train(ours, wrapped, 5)
    else:
        algorithm, _ = make_algorithm(name, dist.new_group(), list(ours.parameters()), timeout_s=30)
        wrapped.register_comm_hook(None, as_ddp_hook(algorithm))
        trained = _train(ours, wrapped, 5)
        algorithm.close()
    return trained, reference


@pytest.mark.parametrize("name", PLUGGABLE)
def test_an_algorithm_under_accelerate_is_bitwise_equal_to_ddp(name: str) -> None:
    assert all(_same(*result) for result in _run(_under_accelerate, name))


def test_a_compressing_hook_under_accelerate_keeps_ranks_equal_and_near_ddp() -> None:
    (first, reference), (second, _) = _run(_under_accelerate, "int8")
    assert _same(first, second)
    assert not _same(first, reference)
    for mine, theirs in zip(first, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2)


# -- torch's hooks on our engine ---------------------------------------------------------------------------------


def _one_after_the_other(hook: Callable[..., Any]) -> Callable[..., Any]:
    """PowerSGD's callbacks start collectives: with several buckets under way, ranks may start them in another order."""

    def waited(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future = hook(state, bucket)
        future.wait()
        return future

    waited.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    return waited


TORCH_HOOKS: dict[str, Callable[..., Any]] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "powersgd": powerSGD_hook,
    "bf16_wrapper(powersgd)": default_hooks.bf16_compress_wrapper(powerSGD_hook),
}


def _torch_hook(rank: int, name: str, by_name: bool) -> Any:
    power = {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2} if "powersgd" in name else None
    ours = _model()
    theirs = deepcopy(ours)
    wrapped = DistributedDataParallel(theirs, bucket_cap_mb=SMALL_CAP_MIB)
    state = PowerSGDState(dist.new_group(), **power) if power else dist.new_group()
    wrapped.register_comm_hook(state, _one_after_the_other(TORCH_HOOKS[name]))
    reference = _train(theirs, wrapped, 8)
    reducer = reducer_for(
        ours,
        comm_hook=name if by_name else TORCH_HOOKS[name],
        comm_state=power,
        bucket_mib=SMALL_CAP_MIB,
    )
    trained = _train(ours, ours, 8, reducer.backward_pass)
    num_buckets = len(reducer.buckets)
    reducer.close()
    compression = state.compression_stats()[0] if power else 2.0
    return trained, reference, num_buckets, compression


@pytest.mark.parametrize("by_name", [True, False], ids=["by_name", "callable"])
@pytest.mark.parametrize("name", TORCH_HOOKS)
def test_a_hook_of_torch_gives_the_bits_that_it_gives_under_ddp(name: str, by_name: bool) -> None:
    results = _run(_torch_hook, name, by_name)
    for trained, reference, num_buckets, compression in results:
        assert _same(trained, reference)
        assert num_buckets > 2
        assert compression > 1.5, "PowerSGD did not compress"
    assert _same(results[0][0], results[1][0])


# -- hooks that do not work --------------------------------------------------------------------------------------


def wrong_shape(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer()[:-1])
    return future


def no_future(state: Any, bucket: Any) -> Any:
    return bucket.buffer()


def raises(state: Any, bucket: Any) -> Any:
    raise ZeroDivisionError("a mistake in the hook")


def _use_hook(rank: int, hook: Any, state: Any) -> Any:
    net = _model()
    try:
        reducer = reducer_for(net, comm_hook=hook, comm_state=state)
        _train(net, net, 1, reducer.backward_pass)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("hook", "state", "text"),
    [
        (wrong_shape, None, r"communication hook wrong_shape must give a tensor of shape \(\d+,\), got shape"),
        (no_future, None, r"communication hook no_future must return a torch.futures.Future, got Tensor"),
        ("nonsense", None, "there is no communication hook 'nonsense'"),
        ("torch.nonsense.hook", None, "'torch.nonsense.hook' cannot be imported"),
        ("bf16", {"share": 0.1}, "communication hook bf16_compress_hook takes no options, got share"),
        ("top_k", {"shares": 0.1}, "state of communication hook top_k_hook: .*shares"),
        (
            "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.batched_powerSGD_hook",
            None,
            "communication hook batched_powerSGD_hook cannot run here: .*gloo",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_hook_is_named_on_all_ranks(hook: Any, state: Any, text: str) -> None:
    for kind, message in _run(_use_hook, hook, state):
        assert kind is BadHook
        assert re.search(text, message)


def test_an_error_in_a_hook_reaches_the_training_loop() -> None:
    for _, message in _run(_use_hook, raises, None):
        assert "a mistake in the hook" in message


def _bad_on_one_rank(rank: int) -> Any:
    return _use_hook(rank, "bf16" if rank else "nonsense", None)


def test_a_hook_that_one_rank_lacks_fails_on_all() -> None:
    (_, first), (kind, second) = _run(_bad_on_one_rank)
    assert kind is BadHook
    assert second == f"rank 0 failed: {first}"


# -- models ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Two dtypes, one element, 100 MB, a parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(25_000_000))
        self.narrow = nn.Parameter(torch.zeros(33, 7, dtype=torch.bfloat16))
        self.one = nn.Parameter(torch.zeros(1))
        self.scalar = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
        self.tied = nn.Linear(6, 6)
        self.also = nn.Linear(6, 6)
        self.also.weight = self.tied.weight


def _factors(net: nn.Module, rank: int, step: int) -> list[Tensor]:
    """What every parameter's gradient on ``rank`` is to be."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in net.parameters()]


def _odd_model(rank: int) -> Any:
    net = Odd()
    reducer = reducer_for(net)
    right = []
    for step in range(3):  # the second has other buckets than the first
        net.zero_grad()
        factors = _factors(net, rank, step)
        tied = (net.also.weight * factors[-3]).sum()
        with reducer.backward_pass():
            loss = sum(((p * f).sum().float() for p, f in zip(net.parameters(), factors, strict=True)), tied)
            loss.backward()
        for number, (p, a, b) in enumerate(
            zip(net.parameters(), _factors(net, 0, step), _factors(net, 1, step), strict=True)
        ):
            places = 2 if p is net.tied.weight else 1
            right.append((number, torch.equal(p.grad, places * (a * 0.5 + b * 0.5))))
    reducer.close()
    return right


def test_a_model_of_odd_parameters_is_averaged_right() -> None:
    for right in _run(_odd_model):
        assert len(right) == 3 * 7
        assert not [number for number, is_right in right if not is_right]


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)),
        r"rank 0 has '1.weight' \(float32, shape 5x4\) where rank 1 has '1.weight' \(float32, shape 6x4\)",
    ),
    "name": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 5)),
        r"rank 0 has '1.weight' .* where rank 1 has '2.weight'",
    ),
    "dtype": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5).double()),
        r"rank 0 has '1.weight' \(float32, .* where rank 1 has '1.weight' \(float64",
    ),
    "fewer": (lambda: nn.Sequential(nn.Linear(4, 4)), r"only rank 0 has '1.weight'"),
    "more": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(1, 1)),
        r"only rank 1 has '2.weight'",
    ),
}


def _mismatch(rank: int, case: str) -> Any:
    net = OTHERS[case][0]() if rank == 1 else nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    try:
        reducer_for(net)
    except ModelMismatch as error:
        return str(error)


@pytest.mark.parametrize("case", OTHERS)
def test_ranks_with_different_models_all_say_where(case: str) -> None:
    for message in _run(_mismatch, case, world_size=3):
        assert re.search(OTHERS[case][1], message)


# -- the size of buckets -----------------------------------------------------------------------------------------


def _tune(rank: int) -> Any:
    net = _model(512)
    lines: list[str] = []
    reducer = reducer_for(net, algorithm="native", bucket_mib="auto", log=lines.append)
    # two steps in which the order is learnt, five of every size; the next begins with the decision
    weights = _train(net, net, 5 * len(CANDIDATES_MIB) + 3, reducer.backward_pass)
    size = reducer.state_dict()["bucket_mib"]
    reducer.close()
    return size, "\n".join(lines), weights


def test_the_bucket_size_is_found_and_is_the_same_on_all_ranks() -> None:
    results = _run(_tune)
    sizes = {size for size, _, _ in results}
    assert len(sizes) == 1
    table = results[0][1]
    assert [float(size) for size in re.findall(r"^ +([\d.]+) MiB +[\d.]+ ms", table, re.MULTILINE)] == [*CANDIDATES_MIB]
    assert re.search(rf"^ +{sizes.pop():g} MiB .*<- chosen$", table, re.MULTILINE)
    assert results[1][1] == ""
    assert _same(results[0][2], results[1][2])


def test_make_reducer_needs_no_module() -> None:
    def reduce(rank: int) -> Any:
        weight = nn.Parameter(torch.zeros(3))
        reducer = make_reducer([("weight", weight)])
        with reducer.backward_pass():
            (weight * rank).sum().backward()
        reducer.close()
        return weight.grad.tolist()

    assert _run(reduce) == [[0.5] * 3] * 2
