"""The compression hooks: what is not sent is kept, ranks agree to the bit, a saved state goes on unchanged."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsync.comm.buckets import Bucket, make_buckets
from gradsync.comm.hooks import Int8State, TopKState, int8_hook, top_k_hook
from gradsync.comm.hooks.compression import working_dtype
from gradsync.comm.hooks.top_k import largest

HOOKS: dict[type, Callable[..., Any]] = {TopKState: top_k_hook, Int8State: int8_hook}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [[(1,)], [(255,), (3, 7)], [(256,)], [(16, 40), (17,), (1,)], [(600,), (5, 5), (2, 3, 4)]]


def _join(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _bucket(shapes: list[tuple[int, ...]], dtype: torch.dtype, index: int = 0) -> Bucket:
    parameters = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    return Bucket(index, parameters, True, torch.zeros(sum(p.numel() for p in parameters), dtype=dtype))


def _average(state: Any, bucket: Bucket, gradient: Tensor) -> Tensor:
    """One step; a copy of the result, which is the bucket's buffer."""
    bucket.buffer().copy_(gradient)
    result = HOOKS[type(state)](state, bucket).wait()
    assert (result.shape, result.dtype) == (gradient.shape, gradient.dtype)
    return result.clone()


def _error(state: Any, gradient: Tensor) -> Tensor:
    """All of bucket 0, as it is in the state dict."""
    errors = state.state_dict()["errors"]
    if not errors:
        return torch.zeros_like(gradient, dtype=working_dtype(gradient.dtype))
    return torch.cat([errors[f"0.{position}"] for position in range(len(errors))])


def _random_steps(rank: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, num_steps: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    numel = _bucket(shapes, dtype).buffer().numel()
    for step in range(num_steps):
        gradient = torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0 ** (step - 2)
        gradient[torch.rand(numel, generator=generator) < 0.2] = 0
        yield gradient.to(dtype)


def _states() -> list[Any]:
    return [TopKState(share=0.1), TopKState(share=1), Int8State(), Int8State(block_size=10), Int8State(block_size=1)]


def _conserve(rank: int) -> None:
    _join(rank, 1)
    for dtype in DTYPES:
        for shapes in SHAPES:
            for state in _states():
                bucket = _bucket(shapes, dtype)
                for gradient in _random_steps(len(shapes), shapes, dtype):
                    corrected = gradient + _error(state, gradient)
                    sent = _average(state, bucket, gradient)  # the average over one rank
                    _check_conserved(state, corrected, sent, _error(state, gradient))


def _check_conserved(state: Any, corrected: Tensor, sent: Tensor, error: Tensor) -> None:
    if isinstance(state, TopKState):
        assert torch.equal(sent.to(error.dtype) + error, corrected)
        assert int((sent != 0).sum()) <= state.num_sent(sent)
        return
    block = min(state.block_size, sent.numel())
    padded = nn.functional.pad(corrected, (0, -sent.numel() % block))
    scale = padded.view(-1, block).abs().amax(1).div(127).repeat_interleave(block)[: sent.numel()]
    assert bool((error.abs() <= scale * (1 + 1e-5)).all())
    # Each of sent and error is rounded once; in half precision, sent is rounded again to give the result.
    bound = 2 * torch.finfo(error.dtype).eps * scale + torch.finfo(sent.dtype).eps * corrected.abs().add(scale)
    if sent.dtype == torch.float16:
        bound += 2.0**-24  # its smallest number
    assert bool(((sent.to(error.dtype) + error - corrected).abs() <= bound).all())


def test_what_is_not_sent_is_kept_for_the_next_step() -> None:
    run_distributed(_conserve, 1)


def _average_all(rank: int, world_size: int) -> Any:
    _join(rank, world_size)
    results = []
    for dtype in DTYPES:
        for shapes in SHAPES:
            for state in [TopKState(share=1), TopKState(share=0.1), Int8State(block_size=32)]:
                gradients = [next(_random_steps(other, shapes, dtype)) for other in range(world_size)]
                bucket = _bucket(shapes, dtype)
                passed: list[int] = []
                with _recorded(passed):
                    average = _average(state, bucket, gradients[rank])
                assert state.num_bytes(bucket) == 2 * (world_size - 1) * passed[0]
                assert len(passed) == 1
                results += [average, *(_average(state, bucket, gradients[rank]) for _ in range(2))]
                mean = torch.stack([g.double() for g in gradients]).mean(0)
                if getattr(state, "share", 1) == 1:
                    # one scale per rank is at most 1/127 of that rank's largest element
                    highest = sum(float(g.abs().max()) for g in gradients) / world_size
                    scale = highest / 127 if isinstance(state, Int8State) else 0.0
                    bound = scale * 1.001 + 4 * world_size * torch.finfo(dtype).eps * highest
                    assert float((average.double() - mean).abs().max()) <= bound
    return results


@contextmanager
def _recorded(sizes: list[int]) -> Iterator[None]:
    """Within it, the bytes that each all-gather sends are appended to ``sizes``."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    original = getattr(dist, name)

    def gather(output: Tensor, message: Tensor, **options: Any) -> Any:
        sizes.append(message.nbytes)
        return original(output, message, **options)

    setattr(dist, name, gather)
    yield
    setattr(dist, name, original)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_average_is_right_within_the_scale_and_equal_on_all_ranks(world_size: int) -> None:
    results = run_distributed(_average_all, world_size, world_size)
    assert all(torch.equal(mine, first) for other in results for mine, first in zip(other, results[0], strict=True))


def _round_often(rank: int) -> Any:
    _join(rank, 1)
    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(5))
    num_times = 512
    state, bucket = Int8State(error_feedback=False, seed=3), _bucket([(num_times, 4096)], torch.float32)
    sent = _average(state, bucket, gradient.repeat(num_times)).view(num_times, -1)
    scale = gradient.view(-1, 256).abs().amax(1).div(127).repeat_interleave(256)
    return (sent - gradient).double() / scale


def test_stochastic_rounding_is_unbiased() -> None:
    error = run_distributed(_round_often, 1)[0]
    # A value between two levels has a standard deviation of at most half a level. Six deviations of a mean are
    # exceeded with probability 2e-9, times 4096 means.
    assert float(error.abs().max()) <= 1 + 1e-4
    assert float(error.mean(0).abs().max()) <= 6 * 0.5 / error.shape[0] ** 0.5
    assert float(error.mean().abs()) <= 6 * 0.5 / error.numel() ** 0.5
    assert float(error.abs().mean()) > 0.2  # it does round


def _not_finite(rank: int) -> None:
    _join(rank, 2)
    for dtype in DTYPES:
        for value in (float("inf"), float("-inf"), float("nan")):
            for state in (TopKState(share=0.01), Int8State(block_size=64)):
                bucket, bad = _bucket([(200,)], dtype), torch.ones(200, dtype=dtype)
                if rank == 1:
                    bad[70:75] = value  # more than top-k sends
                average = _average(state, bucket, bad)
                assert not bool(average[70:75].isfinite().all())
                if isinstance(state, Int8State):
                    assert not bool(average[64:128].isfinite().any())
                    assert bool(average[:64].isfinite().all())
                # the run goes on when the optimizer has skipped the step
                assert bool(_average(state, bucket, torch.ones(200, dtype=dtype)).isfinite().all())
    for values in ([3e38, -3e38, 1.0], [1e-45, -1e-40, 0.0], [0.0, 0.0, 0.0]):
        gradient = torch.tensor(values)
        average = _average(Int8State(), _bucket([(3,)], torch.float32), gradient)
        bound = max(float(gradient.abs().max()) * 1.001 / 127, 2.0**-110)
        assert float((average.double() - gradient.double()).abs().max()) <= bound
        assert values[0] != 0 or not bool(average.any())


def test_what_is_not_finite_stays_visible_once_and_extremes_stay_finite() -> None:
    run_distributed(_not_finite, 2)


def _round_largest(rank: int) -> Any:
    _join(rank, 1)
    gradient = torch.rand(2**18, generator=torch.Generator().manual_seed(6)).sub(0.5)
    return gradient, _average(Int8State(block_size=1), _bucket([(2**18,)], torch.float32), gradient)


def test_the_largest_of_a_block_never_wraps_around() -> None:
    gradient, sent = run_distributed(_round_largest, 1)[0]  # each is the largest of its block, with many a rounding
    assert bool(((sent - gradient).abs() <= gradient.abs() / 127 * 1.0001).all())


class _Backwards(nn.Module):
    """Uses its layers in another order than it has them, so that DDP rebuilds its buckets in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20, bias=False) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for index in (2, 0, 3, 1):
            x = torch.tanh(self.layers[index](x))
        return x.square().sum()


def _train_ddp(rank: int, world_size: int) -> Any:
    _join(rank, world_size)
    return [
        _train_with(cls, options, bucket_mib, rank)
        for cls, options in [(TopKState, {"share": 0.05}), (Int8State, {})]
        # first one bucket; then two, or one of the same size in another order
        for bucket_mib in (0.002, 25)
    ]


def _train_with(cls: type, options: dict[str, Any], bucket_mib: float, rank: int) -> Any:
    torch.manual_seed(0)
    model = _Backwards()
    state = cls(**options, named_parameters=model.named_parameters())
    hook, layouts = HOOKS[cls], []

    def recording(state, bucket):  # no annotations: DDP would refuse other ones than its own
        layouts.append((bucket.index(), [id(p) for p in bucket.parameters()]))
        return hook(state, bucket)

    wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_mib)
    wrapped.register_comm_hook(state, recording)
    torch.manual_seed(100 + rank)
    batches = [torch.randn(4, 20) for _ in range(5)]
    averaged = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    local = {name: torch.zeros_like(total) for name, total in averaged.items()}
    for batch in batches:
        model.zero_grad()
        model(batch).backward()
        _add_gradients(local, model)
        model.zero_grad()
        wrapped(batch).backward()
        _add_gradients(averaged, model)
    assert layouts[0] != layouts[1]  # rebuilt
    return local, averaged, {name: error.double() for name, error in state.state_dict()["errors"].items()}


def _add_gradients(totals: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        totals[name] += parameter.grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_under_ddp_every_parameter_keeps_its_error_when_the_buckets_are_rebuilt(world_size: int) -> None:
    for of_ranks in zip(*run_distributed(_train_ddp, world_size, world_size), strict=True):
        for key, averaged in of_ranks[0][1].items():
            assert all(torch.equal(averaged, other[1][key]) for other in of_ranks)
            gradients = torch.stack([local[key] for local, _, _ in of_ranks]).sum(0)
            errors = torch.stack([error[key].view_as(averaged) for _, _, error in of_ranks]).sum(0)
            # conserved over all steps, parameter by parameter; float32 rounds a few times a step and rank
            torch.testing.assert_close(world_size * averaged + errors, gradients, rtol=1e-5, atol=1e-5)
            assert float(errors.abs().max()) > 1e-3  # what the test is about


def _accepted(rank: int) -> None:
    _join(rank, 1)
    for state in (TopKState(), Int8State()):
        wrapped = DistributedDataParallel(nn.Linear(3, 3))
        wrapped.register_comm_hook(state, HOOKS[type(state)])  # checks its signature
        wrapped(torch.ones(3)).sum().backward()


def test_ddp_takes_the_hooks() -> None:
    run_distributed(_accepted, 1)


def _layout(shapes: list[tuple[int, ...]], sizes: list[int]) -> tuple[list[Bucket], list[tuple[str, Tensor]]]:
    parameters = [torch.zeros(shape) for shape in shapes]
    runs = [run.tolist() for run in torch.arange(len(parameters)).split(sizes)]
    buckets = make_buckets([[parameters[i] for i in run] for run in runs])
    return buckets, [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]


def _step(state: Any, buckets: list[Bucket], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = torch.randn(sum(b.buffer().numel() for b in buckets), generator=generator)
    parts = total.split([b.buffer().numel() for b in buckets])
    return [_average(state, bucket, part) for bucket, part in zip(buckets, parts, strict=True)]


def _reload(rank: int) -> Any:
    _join(rank, 2)
    shapes = [(30, 10), (7,), (500,), (3, 3)]
    for is_named in (False, True):
        for cls, options in [(TopKState, {"share": 0.1}), (Int8State, {"seed": 9})]:
            first, names = _layout(shapes, [2, 2])
            state = cls(**options, named_parameters=names if is_named else ())
            for step in range(3):
                _step(state, first, 10 * rank + step)
            file = io.BytesIO()
            torch.save(state.state_dict(), file)
            expected = [_step(state, first, 10 * rank + step) for step in (3, 4)]
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            second, names = _layout(shapes, [2, 2])  # as in a new process: other parameter objects
            state = cls(**options, named_parameters=names if is_named else ())
            state.load_state_dict(saved)
            again = state.state_dict()  # a run that saves before its first step
            assert all(torch.equal(error, saved["errors"][key]) for key, error in again["errors"].items())
            continued = [_step(state, second, 10 * rank + step) for step in (3, 4)]
            for mine, theirs in zip(chain(*expected), chain(*continued), strict=True):
                assert torch.equal(mine, theirs)
            _check_other_layout(cls, saved, shapes, is_named)
    with pytest.raises(ValueError, match=f"rank {rank} of 2 got the state that rank {1 - rank} of 2 saved"):
        TopKState().load_state_dict({"rank": 1 - rank, "world_size": 2, "errors": {}})


def _check_other_layout(cls: type, saved: Any, shapes: list[tuple[int, ...]], is_named: bool) -> None:
    """Named errors find their parameters in other buckets; errors without names notice."""
    buckets, names = _layout(shapes, [1, 3])
    state = cls(error_feedback=True, named_parameters=names if is_named else ())
    state.load_state_dict(saved)
    if not is_named:
        with pytest.raises(ValueError, match=r"saved error '1.0' has 500 elements and its parameter has 7"):
            _step(state, buckets, 0)
        return
    for bucket in buckets:  # nothing is sent that was not an error before
        _average(state, bucket, torch.zeros_like(bucket.buffer()))
    for key, error in state.state_dict()["errors"].items():
        assert error.shape == saved["errors"][key].shape
        assert float((error - saved["errors"][key]).abs().min()) < 1e-2


def test_a_reloaded_state_continues_to_the_bit() -> None:
    run_distributed(_reload, 2)


def _move(rank: int) -> None:
    _join(rank, 1)
    parameters = [torch.zeros(4) for _ in range(4)]
    state = TopKState(share=0.25, named_parameters=[(f"p{i}", p) for i, p in enumerate(parameters)])
    layouts = [[[0, 1], [2, 3]], [[0, 1], [3, 2]], [[0, 1, 3], [2]], [[2], [1], [0], [3]], [[3, 0, 2, 1]]]
    totals, kept = torch.zeros(4, 4), torch.zeros(4, 4)
    for step, layout in enumerate(layouts * 2):
        for bucket in make_buckets([[parameters[i] for i in run] for run in layout]):
            gradient = torch.arange(bucket.buffer().numel()).add(step).float()  # whole numbers: sums are exact
            owners = [next(i for i in range(4) if parameters[i] is p) for p in bucket.parameters()]
            totals[owners] += gradient.view(-1, 4)
            totals[owners] -= _average(state, bucket, gradient).view(-1, 4)
        for key, error in state.state_dict()["errors"].items():
            kept[int(key[1:])] = error
        assert torch.equal(kept, totals), layout


def test_errors_follow_their_parameters_from_layout_to_layout() -> None:
    run_distributed(_move, 1)


class _Distance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100))

    def forward(self, target: Tensor) -> Tensor:
        return (self.weight - target).square().sum() / 2


def _regress(rank: int) -> list[float]:
    """Mean squared distance from the optimum for plain DDP, top-k with error feedback, and top-k without."""
    _join(rank, 2)
    optimum = torch.randn(100, generator=torch.Generator().manual_seed(1))
    # What the ranks' data disagree about is a tenth of the elements, has the largest gradients, and cancels out.
    target = optimum.clone()
    target[:10] += 5.0 if rank == 0 else -5.0
    losses = []
    for state in (None, TopKState(share=0.1), TopKState(share=0.1, error_feedback=False)):
        model = _Distance()
        wrapped = DistributedDataParallel(model)
        if state is not None:
            wrapped.register_comm_hook(state, top_k_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        for _ in range(250):
            optimizer.zero_grad()
            wrapped(target).backward()
            optimizer.step()
        losses.append(float((model.weight.detach() - optimum).square().mean()))
    return [float(optimum.square().mean()), *losses]


def test_error_feedback_is_what_makes_top_k_converge() -> None:
    begin, plain, top_k, without = run_distributed(_regress, 2)[0]
    assert plain < 0.001 * begin
    assert top_k < plain + 0.02 * begin  # the margin: 2 % of what there was to gain
    assert without > 0.5 * begin


def _naive_largest(magnitude: Tensor, k: int) -> list[float]:
    return sorted(magnitude.tolist(), key=lambda x: -1e400 if x != x else -x)[:k]


@pytest.mark.parametrize("k", [1, 700, 7000, 70_000])
def test_the_largest_are_found_exactly(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    uniform = torch.rand(70_000, generator=generator)
    rising = uniform.sort().values
    column = torch.zeros(70_000)
    column[::97] = uniform[::97]  # the sample sees nothing else
    spikes = torch.zeros(70_000)
    spikes[5::1000] = 1.0  # the sample sees few
    special = uniform.clone()
    special[[3, 97, 194, 69_999]] = torch.tensor([float("nan"), float("inf"), float("nan"), 2.0])
    for magnitude in (uniform, rising, column, spikes, special, torch.ones(70_000)):
        indices = largest(magnitude, k)
        assert indices.unique().numel() == k
        found, wanted = magnitude[indices].tolist(), _naive_largest(magnitude, k)
        assert sorted(map(str, found)) == sorted(map(str, wanted))


def test_options_that_make_no_sense_are_refused() -> None:
    for share in (0, -0.1, 2):
        with pytest.raises(ValueError, match=f"share must be > 0 and <= 1, got {share}"):
            TopKState(share=share)
    with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
        Int8State(block_size=0)
    with pytest.raises(ValueError, match="seed must be >= 0"):
        Int8State(seed=-1)
