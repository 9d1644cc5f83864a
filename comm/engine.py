"""From options to a :class:`.GradientReducer`: groups, algorithm or hook, tuner. What every front end goes through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .agreement import all_gather_bytes, check_same_model
from .algorithms import AlgorithmUnavailable, make_algorithm, name_of
from .algorithms.algorithm import Algorithm
from .algorithms.choice import AUTO
from .broadcast import broadcast_tensors
from .hooks import BadHook, Hook, HookAlgorithm, make_hook
from .reducer import GradientReducer
from .timeline import Timeline
from .tuner import BucketTuner

DEFAULT_BUCKET_MIB = 25.0


def _log(text: str) -> None:
    logging.getLogger("gradsync").info(text)


def reducer_for(module: nn.Module, **options: Any) -> GradientReducer:
    """Give all ranks rank 0's parameters and buffers, as DDP does, and make the reducer that keeps them equal.

    Blocks; called on all ranks once the default process group is there and the module is on its device.

    Args:
        module: Equal in names, shapes and dtypes on all ranks.
        options: Of :func:`make_reducer`.

    Raises:
        ModelMismatch: the ranks hold different models.
    """
    state = [*module.named_parameters(), *module.named_buffers()]
    check_same_model(state)
    broadcast_tensors(tensor for _, tensor in state)
    return make_reducer(module.named_parameters(), **options)


def make_reducer(
    named_parameters: Iterable[tuple[str, Tensor]],
    algorithm: str = AUTO,
    comm_hook: str | Hook | None = None,
    comm_state: Any = None,
    bucket_mib: float | str = DEFAULT_BUCKET_MIB,
    overlap: bool = True,
    timeout_s: float = 300.0,
    timeline: Timeline | None = None,
    log: Callable[[str], None] = _log,
) -> GradientReducer:
    """A reducer over all ranks, on groups of its own. Blocks; called on all ranks with the same options.

    Args:
        named_parameters: Equal on all ranks.
        algorithm: One of :data:`.ALGORITHMS`, or ``auto``.
        comm_hook: A DDP communication hook that takes the algorithm's place: see :func:`.make_hook`.
        comm_state: Its state, or the options of that.
        bucket_mib: A bucket is full when it reaches so many MiB; ``auto`` tries sizes in the first steps.
        overlap: Reduce during the backward pass (True) or after it (False).
        timeout_s: How long a rank waits for the others in one operation.
        timeline: Where the spans go.
        log: Takes what was chosen, on rank 0.

    Raises:
        ValueError: ``bucket_mib`` is no size.
        AlgorithmUnavailable: the algorithm cannot run here.
        BadHook: there is no such hook, or it cannot work here.
        SharedMemoryError: there is too little memory for shared buckets.
    """
    check_bucket_mib(bucket_mib)
    named = list(named_parameters)
    groups = [private_group(timeout_s), private_group(timeout_s, backend="gloo")]
    say = log if dist.get_rank() == 0 else lambda text: None
    chosen = _on_all_ranks(
        lambda: _averaging(algorithm, comm_hook, comm_state, groups[0], named, timeout_s, say), groups
    )
    return GradientReducer(
        named,
        chosen,
        groups[1],
        bucket_mib=DEFAULT_BUCKET_MIB if bucket_mib == AUTO else float(bucket_mib),
        overlap=overlap,
        timeline=timeline,
        tuner=BucketTuner(groups[1], say) if bucket_mib == AUTO else None,
        own_groups=groups,
    )


def check_bucket_mib(given: float | str) -> None:
    """Raises ValueError unless ``given`` is a size in MiB, or ``auto``."""
    is_size = isinstance(given, (int, float)) and 0 < given < float("inf")
    if not is_size and given != AUTO:
        raise ValueError(f"bucket_mib must be > 0 MiB or {AUTO}, got {given!r}")


def _averaging(
    algorithm: str,
    hook: str | Hook | None,
    state: Any,
    group: dist.ProcessGroup,
    named: list[tuple[str, Tensor]],
    timeout_s: float,
    say: Callable[[str], None],
) -> Algorithm:
    if hook is None:
        if state is not None:
            raise AlgorithmUnavailable("comm_state is the state of a comm_hook, but there is no comm_hook")
        chosen, reason = make_algorithm(algorithm, group, [parameter for _, parameter in named], timeout_s)
        if reason:
            say(f"all-reduce algorithm: {name_of(chosen)} ({algorithm}: {reason})")
        return chosen
    if algorithm != AUTO:
        raise AlgorithmUnavailable(f"a comm_hook does the communication itself: leave out algorithm {algorithm!r}")
    averaging = HookAlgorithm(group, *make_hook(hook, state, group, named))
    if not averaging.is_saved:
        say("the state of the communication hook has no state_dict(): a resumed run will start it anew")
    return averaging


def _on_all_ranks(make: Callable[[], Algorithm], groups: list[dist.ProcessGroup]) -> Algorithm:
    """What ``make`` gives; the error of the first rank that failed is every rank's, and their groups are gone.

    Else the others would wait for it in the first step, or see it leave while groups still connect.
    """
    made, failure = None, None
    try:
        made = make()
    except Exception as error:
        failure = error
    texts = all_gather_bytes(str(failure or "").encode(), groups[1])
    if not any(texts):
        assert made is not None
        return made
    for group in groups:
        dist.destroy_process_group(group)
    rank = next(rank for rank, text in enumerate(texts) if text)
    raise failure or BadHook(f"rank {rank} failed: {texts[rank].decode()}")


def private_group(timeout_s: float, backend: str | None = None) -> dist.ProcessGroup:
    """All ranks, apart: on the default group, collectives of others may come in between. Blocks."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s), backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group
