"""An algorithm by name, or the one that suits the ranks (``auto``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ..agreement import all_gather_bytes
from ..shared_memory import HostGroup, SharedMemoryError
from ..shared_memory.room import available_bytes
from .algorithm import Algorithm, AlgorithmUnavailable
from .backend import NaiveAllReduce, NativeAllReduce
from .halving_doubling import HalvingDoublingAllReduce
from .hierarchical import HierarchicalAllReduce
from .ring import RingAllReduce
from .shared_memory import SharedMemoryAllReduce

ALGORITHMS: dict[str, type[Algorithm]] = {
    "naive": NaiveAllReduce,
    "native": NativeAllReduce,
    "ring": RingAllReduce,
    "halving_doubling": HalvingDoublingAllReduce,
    "hierarchical": HierarchicalAllReduce,
    "shared_memory": SharedMemoryAllReduce,
}

AUTO = "auto"


def name_of(algorithm: Algorithm) -> str:
    """Its name among :data:`ALGORITHMS`; a class of a user's own, or a hook, goes by that class's name."""
    return next((name for name, cls in ALGORITHMS.items() if type(algorithm) is cls), type(algorithm).__name__)


def make_algorithm(
    name: str, group: dist.ProcessGroup, tensors: Sequence[Tensor], timeout_s: float
) -> tuple[Algorithm, str]:
    """The algorithm called ``name``, and why it is that one (empty unless ``auto`` chose it).

    Blocks; called on all ranks of ``group``, which get the same. ``tensors`` are those whose gradients will travel.

    Raises:
        AlgorithmUnavailable: on all ranks alike.
    """
    if name not in ALGORITHMS and name != AUTO:
        raise AlgorithmUnavailable(f"there is no algorithm {name!r}: choose one of {', '.join([AUTO, *ALGORITHMS])}")
    reason = ""
    if name == AUTO:
        is_alone = dist.get_world_size(group) == 1
        obstacle = "there is one rank only" if is_alone else obstacle_to_sharing(group, tensors)
        name = "native" if obstacle else "shared_memory"
        reason = obstacle or f"all {dist.get_world_size(group)} ranks are on one host, gradients on the CPU"
    elif name == "shared_memory" and (obstacle := obstacle_to_sharing(group, tensors)):
        raise AlgorithmUnavailable(f"algorithm shared_memory cannot run here: {obstacle}; native and ring would")
    if name == "shared_memory":
        return SharedMemoryAllReduce(group, timeout_s), reason
    return ALGORITHMS[name](group), reason


def obstacle_to_sharing(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> str | None:
    """Why the ranks cannot sum in shared memory of the size of ``tensors``, None if they can; the same on all ranks.

    Blocks; called on all ranks of ``group``.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "gradients are not on the CPU"
    try:
        HostGroup(group, 0, timeout_s=1.0).close()
    except SharedMemoryError as error:
        return str(error)
    needed = dist.get_world_size(group) * sum(tensor.nbytes for tensor in tensors)
    available = min(int(text) for text in all_gather_bytes(str(available_bytes()).encode(), group))
    if needed > available:
        return f"{needed / 2**20:.0f} MiB of shared memory are needed, {available / 2**20:.0f} MiB are available"
    return None
