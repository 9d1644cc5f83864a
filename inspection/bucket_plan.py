"""How a strategy cuts a model into buckets and shards, and the bytes per step that follow: asked of its own code.

The order in which gradients become ready is known only when a backward pass has run; here it is the reverse of the
module's, as in all networks that compute in the order in which they were built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..comm.algorithms.algorithm import ring_bytes
from ..comm.algorithms.exchange import bytes_of
from ..comm.algorithms.halving_doubling import folded_steps
from ..comm.algorithms.ring import ring_steps
from ..comm.buckets import BufferSpec, layout_in_ready_order
from ..comm.engine import DEFAULT_BUCKET_MIB
from ..comm.server.layout import Layout
from ..comm.server.shards import Cut, Piece, spread
from ..comm.server.wire import WIRE_DTYPES
from ..comm.sharded.layout import ShardPlan, plan_shards
from ..comm.sharded.transport import one_way_bytes
from ..errors import UserError
from ..strategies.server_options import default_part_mib
from ..strategy_variant import Variant

_AUTO = "auto"
_STEPS: dict[str, Callable[[int, int, int], Any]] = {
    "ring": lambda rank, world_size, numel: ring_steps(range(world_size), rank, numel),
    "halving_doubling": folded_steps,
}


@final
@dataclass(frozen=True)
class PlannedBucket:
    """What travels at once.

    Attributes:
        names: Of its parameters, in their order in it; ``name[start:end]`` for a part of one.
        server: Which one steps it, under a parameter server.
        slices: Per world size, the bytes that each rank steps, where ranks divide a bucket.
    """

    names: list[str]
    dtype: torch.dtype
    num_bytes: int
    server: int | None = None
    slices: dict[int, list[int]] | None = None


@final
@dataclass(frozen=True)
class StrategyPlan:
    """A strategy's buckets in launch order.

    Attributes:
        bytes_per_step: Per world size (training processes) the bytes that each rank sends plus receives in a step:
            ``comm/bytes`` of a run.
        notes: What the figures rest on.
    """

    strategy: str
    buckets: list[PlannedBucket]
    bytes_per_step: dict[int, list[int]]
    notes: list[str]


def plan_strategy(module: nn.Module, variant: Variant, world_sizes: Sequence[int]) -> StrategyPlan:
    """Nothing communicates, and no memory for buckets is taken.

    Args:
        module: Of which the trainable parameters travel; it may be on the meta device.
        variant: The strategy and its options.
        world_sizes: Training processes.

    Raises:
        UserError: nobody can say it before a run, or the strategy cannot train the model.
    """
    named: _Named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    _refuse(named)
    strategy, name = variant.make(), variant.strategy.rpartition(".")[2]
    label = f"{variant.strategy}:{variant.text}" if variant.text else variant.strategy
    planners = {"sharded_server": _sharded_server, "parameter_server": _parameter_server}
    plan = planners.get(getattr(strategy, "strategy_name", name), _all_reduce)
    buckets, num_bytes, notes = plan(named, strategy, world_sizes)
    return StrategyPlan(label, buckets, num_bytes, notes)


def _refuse(named: _Named) -> None:
    if not named:
        raise UserError("--buckets: the model has no trainable parameters, so nothing travels")
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter):
            raise UserError(f"--buckets: {name} has no shape before the first batch: give the layer its sizes")
        if parameter.layout != torch.strided:
            raise UserError(f"--buckets: {name} is sparse, which no strategy can send: use a dense parameter")


_Named = list[tuple[str, Tensor]]
_Planned = tuple[list[PlannedBucket], dict[int, list[int]], list[str]]


# -- all-reduce ----------------------------------------------------------------------------------------------


def _all_reduce(named: _Named, strategy: Any, world_sizes: Sequence[int]) -> _Planned:
    """Lightning's ``ddp`` and ``manual_allreduce``, from the second step on; the first has a bucket per dtype."""
    is_ddp = not hasattr(strategy, "options")
    sizes, notes = _ddp_sizes(strategy) if is_ddp else _own_sizes(strategy.options)
    names = {p: name for name, p in named}
    runs = layout_in_ready_order([p for _, p in reversed(named)], *sizes)
    specs = [BufferSpec.of(run) for run in runs]
    buckets = [_bucket([names[p] for p in run], spec) for run, spec in zip(runs, specs, strict=True)]
    if is_ddp:  # a run's figure is of all buckets together, as DDP tells their sizes
        total = sum(map(_size, specs))
        return buckets, {n: [ring_bytes(total, n)] * n for n in world_sizes}, notes
    algorithm = strategy.options["algorithm"]
    num_bytes = {
        n: [sum(_reduced_bytes(algorithm, rank, n, spec) for spec in specs) for rank in range(n)] for n in world_sizes
    }
    return buckets, num_bytes, notes


def _ddp_sizes(strategy: Any) -> tuple[list[float], list[str]]:
    """In MiB, of a bucket and, where it is another one, of the first. Of a size of one's own the first one is, too."""
    given = strategy._ddp_kwargs.get("bucket_cap_mb")
    return ([given, given] if given else [DEFAULT_BUCKET_MIB]), []


def _own_sizes(options: dict[str, Any]) -> tuple[list[float], list[str]]:
    _check_known(options)
    if options["bucket_mib"] != _AUTO:
        return [options["bucket_mib"]], []
    return [DEFAULT_BUCKET_MIB], [f"bucket_mib auto: a run tries sizes, shown are {DEFAULT_BUCKET_MIB:g} MiB"]


def _check_known(options: dict[str, Any]) -> None:
    if "comm_hook" in options:
        raise UserError(
            f"--strategies: what comm_hook {options['comm_hook']} sends is known in a run only: leave it out"
        )
    if options["algorithm"] == "hierarchical":
        raise UserError("--strategies: what algorithm hierarchical sends depends on the hosts of a run: leave it out")


def _reduced_bytes(algorithm: str, rank: int, world_size: int, spec: BufferSpec) -> int:
    if algorithm in _STEPS:
        return bytes_of(_STEPS[algorithm](rank, world_size, spec.numel), spec.dtype.itemsize)
    return ring_bytes(_size(spec), world_size)


def _size(spec: BufferSpec) -> int:
    return spec.numel * spec.dtype.itemsize


def _bucket(names: list[str], spec: BufferSpec, **more: Any) -> PlannedBucket:
    return PlannedBucket(names, spec.dtype, _size(spec), **more)


# -- sharded server ------------------------------------------------------------------------------------------


def _sharded_server(named: _Named, strategy: Any, world_sizes: Sequence[int]) -> _Planned:
    """Reduce-scatter of gradients, all-gather of parameters."""
    names, parameters = {p: name for name, p in named}, [p for _, p in named]
    optimizer = torch.optim.SGD(parameters)  # elementwise, as most are: any of those is cut alike
    shared = strategy.options["share_parameters"]
    plans = {n: plan_shards(parameters, [optimizer], strategy.options["bucket_mib"], n) for n in world_sizes}
    num_bytes = {
        n: [(1 if shared else 2) * sum(one_way_bytes(plan, rank) for plan in own) for rank in range(n)]
        for n, own in plans.items()
    }
    first = next(iter(plans.values()))
    buckets = [
        _bucket(
            [names[p] for p in plan.parameters], plan.spec, slices={n: _slices(plans[n][i], n) for n in world_sizes}
        )
        for i, plan in enumerate(first)
    ]
    return buckets, num_bytes, ["slices are those of an elementwise optimizer (SGD, Adam, AdamW)"]


def _slices(plan: ShardPlan, world_size: int) -> list[int]:
    return [plan.bytes_of(rank) for rank in range(world_size)]


# -- parameter server ----------------------------------------------------------------------------------------


def _parameter_server(named: _Named, strategy: Any, world_sizes: Sequence[int]) -> _Planned:
    """A worker pushes gradients and pulls parameters, however many others there are."""
    options, parameters = strategy.options, [p for _, p in named]
    may_cut = not options["share_parameters"]
    cuts = spread(parameters, options["servers"], may_cut)
    layouts = [_layout(parameters, own, options) for own in cuts]
    buckets = [
        bucket for server, layout in enumerate(layouts) for bucket in _served(named, cuts[server], layout, server)
    ]
    ways = 1 if options["share_parameters"] else 2
    num_bytes = ways * sum(bucket.num_bytes for bucket in buckets)
    notes = [
        "parts are those of tensors on the CPU, cut as for an elementwise optimizer (SGD, Adam, AdamW)",
        "a server exchanges what all workers together exchange with it",
    ]
    return buckets, {n: [num_bytes] * n for n in world_sizes}, notes


def _layout(parameters: Sequence[Tensor], cuts: Sequence[Cut], options: dict[str, Any]) -> tuple[Layout, list[Tensor]]:
    """A server's, and its tensors in the order of ``cuts``."""
    shares_memory = options["transport"] in (_AUTO, "shared_memory")
    part_mib = options["part_mib"] or default_part_mib(options["transport"], shares_memory)
    wire_dtype = WIRE_DTYPES[options["wire_dtype"]] if options.get("wire_dtype") else None
    # a piece of a tensor that has memory shares it; on the meta device nothing has any
    tensors = [Piece(parameters[cut.index].detach().to("meta").requires_grad_(), cut).tensor for cut in cuts]
    return Layout(tensors, part_mib, _on_meta, wire_dtype), tensors


def _on_meta(specs: list[BufferSpec]) -> list[Tensor]:
    return [torch.empty(spec.numel, dtype=spec.dtype, device="meta") for spec in specs]


def _served(
    named: _Named, cuts: Sequence[Cut], laid_out: tuple[Layout, list[Tensor]], server: int
) -> list[PlannedBucket]:
    layout, tensors = laid_out
    names = {tensor: cut.name(*named[cut.index]) for tensor, cut in zip(tensors, cuts, strict=True)}
    pairs = zip(layout.buckets, layout.specs, strict=True)
    return [_bucket([names[p] for p in bucket.parameters()], spec, server=server) for bucket, spec in pairs]


def numbers_by_name(plan: StrategyPlan) -> dict[str, list[int]]:
    """In which buckets a parameter travels; a parameter server's may cut it."""
    found: dict[str, list[int]] = {}
    for number, bucket in enumerate(plan.buckets):
        for name in dict.fromkeys(name.partition("[")[0] for name in bucket.names):
            found.setdefault(name, []).append(number)
    return found
