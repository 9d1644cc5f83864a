"""Laws that hold for every algorithm, on bare ranks: sums are right, alike, repeatable, and cost what is reported."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, run_distributed

from gradsync.comm import ALGORITHMS, Bucket
from gradsync.comm.algorithms import Algorithm, HierarchicalAllReduce, SharedMemoryAllReduce
from gradsync.comm.buckets import BufferSpec, make_buckets
from gradsync.comm.diagnosis import is_lost_peer
from gradsync.comm.shared_memory import PeerLost, SharedMemoryError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLANNED = ("ring", "halving_doubling", "hierarchical")
HOSTS = {2: "ab", 3: "aab", 4: "abba", 5: "aaabb"}
"""Uneven, interleaved, and a middle rank in the chain of a host."""


def _cases() -> list[tuple[str, int]]:
    return [(name, size) for name in ALGORITHMS for size in range(1, 6) if name != "hierarchical" or size > 1]


def _join(rank: int, world_size: int) -> dist.ProcessGroup:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    return dist.new_group()  # pyright: ignore[reportReturnType]


def _make(name: str, group: dist.ProcessGroup) -> Algorithm:
    if name == "hierarchical":
        return HierarchicalAllReduce(group, list(HOSTS[dist.get_world_size(group)]))
    return ALGORITHMS[name](group)


def _buckets(algorithm: Algorithm, layout: Sequence[tuple[torch.dtype, Sequence[int]]]) -> list[Bucket]:
    """One bucket per row of ``layout``: the dtype and the sizes of its parameters."""
    parameters = [[torch.empty(numel, dtype=dtype) for numel in sizes] for dtype, sizes in layout]
    return make_buckets(parameters, algorithm.allocate([BufferSpec.of(run) for run in parameters]))


def _layout(seed: int) -> list[tuple[torch.dtype, list[int]]]:
    """One element, fewer than ranks, primes, several parameters, more than one piece, whatever chance gives."""
    chance = random.Random(seed)
    sizes = [[1], [3, 1], [1009], [chance.randrange(1, 20_000) for _ in range(chance.randrange(1, 4))]]
    layout = [(dtype, run) for dtype in DTYPES for run in sizes]
    return [*layout, *((torch.float32, run) for run in ([2], [7], [13, 6], [65_537, 3], [300_007]))]


def _values(rank: int, bucket: Bucket) -> torch.Tensor:
    """What ``rank`` puts into ``bucket``: signs and magnitudes mixed, so that every order of summing rounds apart."""
    generator = torch.Generator().manual_seed(1000 * bucket.index() + rank)
    flat = bucket.buffer()
    exponents = torch.randint(-8, 8, (flat.numel(),), generator=generator, dtype=torch.float64)
    return (torch.randn(flat.numel(), generator=generator, dtype=torch.float64) * exponents.exp2()).to(flat.dtype)


def _sum_all(algorithm: Algorithm, buckets: list[Bucket]) -> None:
    """All buckets are under way at once, then waited for."""
    for bucket in buckets:
        bucket.buffer().copy_(_values(algorithm.rank, bucket))
    for bucket, future in [(bucket, algorithm.start(bucket)) for bucket in buckets]:
        bucket.take(future.wait())


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)).hexdigest()


def _worst_error(algorithm: Algorithm, bucket: Bucket) -> float:
    """The largest error in units of what rounding may cause."""
    terms = torch.stack([_values(rank, bucket).double() for rank in range(algorithm.world_size)])
    eps = torch.finfo(bucket.buffer().dtype).eps
    # world_size - 1 additions, each off by at most eps/2 of a partial sum, which no order of the terms makes larger
    # than the sum of their magnitudes; the reference's own rounding, in float64, is as much again at most
    bound = 4 * algorithm.world_size * eps * terms.abs().sum(0)
    return float(((bucket.buffer().double() - terms.sum(0)).abs() / bound.clamp(min=1e-300)).max())


# -- sums ----------------------------------------------------------------------------------------------------


def _sum_random(rank: int, world_size: int, name: str) -> Any:
    algorithm = _make(name, _join(rank, world_size))
    buckets = _buckets(algorithm, _layout(seed=world_size))
    digests, errors = [], []
    for _ in range(2):
        _sum_all(algorithm, buckets)
        digests.append(_digest([bucket.buffer() for bucket in buckets]))
        errors += [_worst_error(algorithm, bucket) for bucket in buckets] if rank == 0 else []
    algorithm.close()
    return digests, errors


@pytest.mark.parametrize(("name", "world_size"), _cases())
def test_sums_are_exact_within_rounding_alike_on_all_ranks_and_repeatable(name: str, world_size: int) -> None:
    results = run_distributed(_sum_random, world_size, world_size, name)
    digests, errors = results[0]
    assert max(errors) <= 1
    assert all(result[0] == digests for result in results), "ranks differ"
    assert digests[0] == digests[1], "the same values again gave another sum"


def _sum_in_a_subgroup(rank: int) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=4)
    group = dist.new_group([1, 2, 3])
    found = {}
    for name in ALGORITHMS if isinstance(group, dist.ProcessGroup) else ():
        algorithm = _make(name, group)  # pyright: ignore[reportArgumentType]
        buckets = _buckets(algorithm, [(torch.float64, [1009]), (torch.float32, [2])])
        _sum_all(algorithm, buckets)
        found[name] = max(_worst_error(algorithm, bucket) for bucket in buckets)
        algorithm.close()
    dist.barrier()  # rank 0 holds the store by which the others find each other
    return found


def test_a_group_may_leave_ranks_out() -> None:
    results = run_distributed(_sum_in_a_subgroup, 4)
    assert [len(found) for found in results] == [0] + [len(ALGORITHMS)] * 3
    assert all(error <= 1 for found in results for error in found.values())


def _cut_in_many_ways(rank: int, world_size: int) -> Any:
    algorithm = SharedMemoryAllReduce(_join(rank, world_size))
    numel = 20_011
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(numel, generator=generator)
    digests = []
    for cuts in ([], [1], [1, 2, 3, 4, 5, 10_007], sorted(random.Random(0).sample(range(1, numel), 20))):
        bounds = [0, *cuts, numel]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        buckets = _buckets(algorithm, [(torch.float32, [size]) for size in sizes])
        for bucket, part in zip(buckets, values.split(sizes), strict=True):
            bucket.buffer().copy_(part)
        for future in [algorithm.start(bucket) for bucket in buckets]:
            future.wait()
        digests.append(_digest([bucket.buffer() for bucket in buckets]))
        algorithm.release([bucket.buffer() for bucket in buckets])
    algorithm.close()
    return digests


@pytest.mark.parametrize("world_size", [3, 5])
def test_shared_memory_sums_alike_however_values_are_cut_into_buckets(world_size: int) -> None:
    digests = [digest for result in run_distributed(_cut_in_many_ways, world_size, world_size) for digest in result]
    assert len(set(digests)) == 1


# -- bytes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted_messages() -> Iterator[Callable[[], int]]:
    """The bytes that this rank gave to point-to-point operations so far."""
    total, original = 0, dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal total
        total += sum(operation.tensor.nbytes for operation in operations)
        return original(operations)

    dist.batch_isend_irecv = counting
    yield lambda: total
    dist.batch_isend_irecv = original


def _count(rank: int, world_size: int, name: str) -> Any:
    """Bytes reported for every bucket, bytes really moved, and the bucket's size."""
    algorithm = _make(name, _join(rank, world_size))
    rows = []
    with _counted_messages() as moved:
        sizes = [[1], [3, 1], [1009], [300_007], [3600]]
        for bucket in _buckets(algorithm, [(torch.float32, run) for run in sizes]):
            before = moved()
            algorithm.start(bucket).wait()
            rows.append((algorithm.num_bytes(bucket), moved() - before, bucket.num_bytes))
    algorithm.close()
    return rows


@pytest.mark.parametrize(("name", "world_size"), [case for case in _cases() if case[0] in PLANNED and case[1] > 1])
def test_reported_bytes_are_those_that_travel(name: str, world_size: int) -> None:
    results = run_distributed(_count, world_size, world_size, name)
    assert all(reported == moved for rows in results for reported, moved, _ in rows)
    if name == "hierarchical":
        return
    reported, _, size = zip(*(rows[-1] for rows in results), strict=True)  # divisible by every number of ranks
    if name == "ring" or world_size in (2, 4):
        assert list(reported) == [4 * (world_size - 1) * size[0] // world_size] * world_size
    else:  # beyond a power of two: one bucket out and back, and as much more for the rank in the core
        core = 1 << (world_size.bit_length() - 1)
        inner, extra = 4 * (core - 1) * size[0] // core, 2 * size[0]
        partners = world_size - core
        assert list(reported) == [inner + extra] * partners + [inner] * (core - partners) + [extra] * partners


def test_only_leaders_of_hosts_cross_the_network() -> None:
    """Hosts aaabb: each rank of a host passes a bucket on and back; the two leaders exchange two halves besides."""
    rows = [rows[-1] for rows in run_distributed(_count, 5, 5, "hierarchical")]
    assert [reported / size for reported, _, size in rows] == [2 + 2, 4, 2, 2 + 2, 2]


def _refuse_one_host(rank: int) -> str:
    group = _join(rank, 2)
    with pytest.raises(ValueError, match="all ranks are on one host") as refused:
        HierarchicalAllReduce(group)
    with pytest.raises(ValueError, match="host of each of 2 ranks, got 1"):
        HierarchicalAllReduce(group, ["a"])
    return str(refused.value)


def test_hierarchical_names_what_would_do_on_one_host() -> None:
    text = "algorithm hierarchical cannot run here: all ranks are on one host; shared_memory and native would"
    assert run_distributed(_refuse_one_host, 2) == [text] * 2


# -- failures ------------------------------------------------------------------------------------------------


def _share(group: dist.ProcessGroup) -> tuple[SharedMemoryAllReduce, list[Bucket]]:
    """Shared memory in use: every bucket has been summed once."""
    algorithm = SharedMemoryAllReduce(group)
    buckets = _buckets(algorithm, [(torch.float32, [1000]), (torch.float32, [5])])
    _sum_all(algorithm, buckets)
    return algorithm, buckets


def _notice_that_rank_1_is_lost(algorithm: SharedMemoryAllReduce, buckets: list[Bucket]) -> None:
    for future in [algorithm.start(bucket) for bucket in buckets]:
        with pytest.raises(PeerLost, match="rank 1"):
            future.wait()
    algorithm.close()
    print("noticed", flush=True)


def _lose_a_killed_rank(rank: int) -> None:
    algorithm, buckets = _share(_join(rank, 3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _notice_that_rank_1_is_lost(algorithm, buckets)


def test_a_killed_rank_is_noticed_in_shared_memory() -> None:
    with pytest.raises(RankFailed) as failed:
        run_distributed(_lose_a_killed_rank, 3)
    assert "exit codes {0: 0, 1: -9, 2: 0}" in str(failed.value)
    assert str(failed.value).count("] noticed") == 2


def _lose_a_rank_that_lives_on(rank: int) -> None:
    algorithm, buckets = _share(_join(rank, 3))
    if rank == 1:
        algorithm.close()
    else:
        _notice_that_rank_1_is_lost(algorithm, buckets)
    dist.barrier()  # until the others have noticed


def test_a_rank_that_closes_is_noticed_while_it_lives() -> None:
    run_distributed(_lose_a_rank_that_lives_on, 3)


def _lose_a_peer_of_messages(rank: int, name: str) -> None:
    algorithm = _make(name, _join(rank, 4))
    buckets = _buckets(algorithm, [(torch.float32, [100_003]), (torch.float32, [3])])
    _sum_all(algorithm, buckets)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for future in [algorithm.start(bucket) for bucket in buckets]:
        with pytest.raises(RuntimeError) as lost:
            future.wait()
        assert is_lost_peer(lost.value), lost.value
    algorithm.close()
    print("noticed", flush=True)


@pytest.mark.parametrize("name", PLANNED)
def test_a_killed_rank_fails_this_bucket_and_all_later_ones(name: str) -> None:
    """The second bucket must not take the first one's messages: gloo ends the process if their sizes differ."""
    with pytest.raises(RankFailed) as failed:
        run_distributed(_lose_a_peer_of_messages, 4, name)
    assert "exit codes {0: 0, 1: -9, 2: 0, 3: 0}" in str(failed.value)
    assert str(failed.value).count("] noticed") == 3
    assert "terminate called" not in str(failed.value)


def _own_segments() -> list[str]:
    """Shared memory that this process maps or holds open."""
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:gradsync" in line]
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found += [name for name in [os.readlink(entry)] if "memfd:gradsync" in name]
    return found


def _count_segments(rank: int) -> list[int]:
    """Before, with one layout, with another instead, and after all; without what pytest's own process holds."""
    group = _join(rank, 3)
    gc.collect()
    inherited = len(_own_segments())
    counts = [0]
    algorithm, buckets = _share(group)
    counts.append(len(_own_segments()) - inherited)
    algorithm.release([bucket.buffer() for bucket in buckets])
    del buckets
    buckets = _buckets(algorithm, [(torch.float32, [7])])
    _sum_all(algorithm, buckets)
    counts.append(len(_own_segments()) - inherited)
    algorithm.close()
    del algorithm, buckets
    return [*counts, len(_own_segments()) - inherited]


def test_shared_memory_is_given_back_when_a_layout_or_the_algorithm_goes() -> None:
    per_layout = 2 * 3  # a mapping of every rank, and the file behind it
    assert run_distributed(_count_segments, 3) == [[0, per_layout, per_layout, 0]] * 3


def _end_threads(rank: int) -> list[str]:
    sys.setswitchinterval(10)  # s: a thread gets the GIL when this one waits, not before
    algorithm, _ = _share(_join(rank, 2))
    assert [thread.name for thread in threading.enumerate()] == ["MainThread", "gradsync all-reduce"]
    algorithm.close()
    return [thread.name for thread in threading.enumerate()]


def test_closing_ends_the_thread() -> None:
    """One that gives tensors back while Python exits makes it abort: "terminate called without an active exception"."""
    assert run_distributed(_end_threads, 2) == [["MainThread"]] * 2


def _allocate_too_much(rank: int) -> str:
    group = _join(rank, 3)
    gc.collect()
    inherited = _own_segments()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, resource.RLIM_INFINITY))
    algorithm = SharedMemoryAllReduce(group)
    with pytest.raises(SharedMemoryError) as refused:
        algorithm.allocate([BufferSpec(2 * 1024 * 1024, torch.float32, torch.device("cpu"))])
    text = str(refused.value)
    del refused
    assert len(_own_segments()) == len(inherited)
    return text


def test_too_little_shared_memory_on_one_rank_is_an_error_on_all() -> None:
    texts = run_distributed(_allocate_too_much, 3)
    assert len(set(texts)) == 1
    assert "rank 1: 8 MiB of shared memory are needed per rank: File too large" in texts[0]
