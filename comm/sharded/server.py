"""All of a sharded run on one rank: reducer, transport, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import final

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..algorithms.choice import AUTO, obstacle_to_sharing
from ..engine import private_group
from ..optimizers import is_elementwise
from ..reducer import GradientReducer
from ..timeline import Timeline
from .collective import CollectiveTransport
from .layout import ShardPlan, Unshardable, check_shardable, plan_shards
from .optimizer import ShardedOptimizer
from .shard import Shard
from .shared_memory import SharedMemoryTransport
from .transport import Transport

TRANSPORTS = (AUTO, SharedMemoryTransport.name, CollectiveTransport.name)


@final
class ShardedServer:
    """Made by :func:`make_sharded_server`. All ranks call its methods in the same order.

    Attributes:
        optimizers: In place of those configured, in their order.
        transport_name: What was chosen.
        timeline: Where the spans go.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        optimizers: Sequence[Optimizer],
        plans: Sequence[ShardPlan],
        transport: Transport,
        groups: Sequence[dist.ProcessGroup],
        overlap: bool,
        timeline: Timeline,
    ) -> None:
        self.transport_name = transport.name
        self.timeline = timeline
        planned = [p for plan in plans for p in plan.parameters]
        chosen = set(planned)
        self._frozen = [(names[p], p) for p in names if p not in chosen]
        self._reducer = GradientReducer(
            [(names[p], p) for p in planned],
            transport.reduce_scatter,
            groups[1],
            overlap=overlap,
            timeline=timeline,
            own_groups=groups,
            fixed_layout=[plan.parameters for plan in plans],
        )
        self._shards = self._make_shards(plans, transport, optimizers)
        self.optimizers = [
            ShardedOptimizer(inner, self._shards_of(number, plans), transport, groups[1])
            for number, inner in enumerate(optimizers)
        ]

    def _make_shards(
        self, plans: Sequence[ShardPlan], transport: Transport, optimizers: Sequence[Optimizer]
    ) -> list[Shard]:
        made = []
        for plan, bucket, values in zip(plans, self._reducer.buckets, transport.values, strict=True):
            whole = not is_elementwise(optimizers[plan.optimizer])
            made.append(Shard(plan, bucket, values, transport.rank, whole))
            made[-1].move_in()
        return made

    def _shards_of(self, number: int, plans: Sequence[ShardPlan]) -> list[Shard]:
        return [shard for shard, plan in zip(self._shards, plans, strict=True) if plan.optimizer == number]

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside only accumulate local gradients."""
        return self._reducer.no_sync()

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Wrap one backward pass. On leaving, this rank's slices hold averages; the others are unspecified. Blocks.

        Raises:
            Unshardable: a parameter that was frozen at the start requires gradients.
            PeerLost: a peer has ended or does not come.
        """
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise Unshardable(
                    f"parameter {name!r} was frozen when the run began and now requires gradients, which --trainer."
                    "strategy sharded_server cannot take in: use --trainer.strategy manual_allreduce"
                )
        for shard in self._shards:
            shard.reopen()
        before = self._reducer.num_synchronized
        with self._reducer.backward_pass():
            yield
        if self._reducer.num_synchronized > before:
            for shard in self._shards:
                shard.averaged()

    def close(self) -> None:
        """Parameters get memory of their own again; waits for no peer. Optimizers keep their state."""
        self._reducer.close()
        for optimizer in self.optimizers:
            optimizer.close()


def make_sharded_server(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizers: Sequence[Optimizer],
    bucket_mib: float,
    overlap: bool = True,
    transport: str = AUTO,
    share_parameters: bool = False,
    timeout_s: float = 300.0,
    timeline: Timeline | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> ShardedServer:
    """Divide the optimizers among all ranks, on groups of their own. Blocks; called on all ranks alike.

    Args:
        named_parameters: The module's, equal in shape and value on all ranks.
        optimizers: As configured; not to be stepped any more but through :attr:`ShardedServer.optimizers`.
        bucket_mib: A bucket is full when it reaches so many MiB.
        overlap: Reduce during the backward pass (True) or after it (False).
        transport: One of :data:`TRANSPORTS`.
        share_parameters: All ranks read the same parameters, in shared memory: nothing is copied, but what one of them
            changes by hand, all see at once.
        timeout_s: How long a rank waits for the others in one operation.
        timeline: Where the spans go.
        log: Takes what was chosen, on rank 0.

    Raises:
        Unshardable: the optimizers cannot be divided, or the transport cannot run here; on all ranks alike.
        SharedMemoryError: there is too little memory.
    """
    check_shardable(optimizers)
    named = list(named_parameters)
    plans = plan_shards([p for _, p in named], optimizers, bucket_mib, dist.get_world_size())
    timeline = timeline or Timeline()
    groups = [private_group(timeout_s), private_group(timeout_s, backend="gloo")]
    try:
        name, reason = _choose(transport, groups[1], plans)
        if share_parameters and name != SharedMemoryTransport.name:
            raise Unshardable(f"share_parameters needs transport shared_memory, but it is {name} ({reason})")
        if name == SharedMemoryTransport.name:
            made: Transport = SharedMemoryTransport(groups[1], plans, timeout_s, timeline, share_parameters)
        else:
            made = CollectiveTransport(groups[0], plans, timeline)
    except Exception:
        for group in groups:
            dist.destroy_process_group(group)
        raise
    if dist.get_rank() == 0:
        log(f"sharded_server transport: {name} ({reason})")
    return ShardedServer(_names(named, optimizers), optimizers, plans, made, groups, overlap, timeline)


def _names(named: Iterable[tuple[str, Tensor]], optimizers: Sequence[Optimizer]) -> dict[Tensor, str]:
    """Of all parameters that have an optimizer."""
    known = {p: name for name, p in named}
    return {
        p: known.get(p, f"optimizer {number}, parameter {index}")
        for number, optimizer in enumerate(optimizers)
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }


def _choose(transport: str, group: dist.ProcessGroup, plans: Sequence[ShardPlan]) -> tuple[str, str]:
    """The transport's name, and why it is that one; the same on all ranks."""
    if transport == CollectiveTransport.name:
        return transport, "as asked for"
    parameters = [p for plan in plans for p in plan.parameters]
    obstacle = obstacle_to_sharing(group, [*parameters, *parameters])  # gradients and values
    if obstacle is None:
        return SharedMemoryTransport.name, "all ranks are on one host, parameters on the CPU"
    if transport == SharedMemoryTransport.name:
        raise Unshardable(f"transport shared_memory cannot run here: {obstacle}; collective would")
    return CollectiveTransport.name, obstacle
