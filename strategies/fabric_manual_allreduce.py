"""``Fabric(strategy="manual_allreduce")``: our reducer under Lightning Fabric, where DDP would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from ..comm.agreement import ModelMismatch, check_same_model
from ..comm.broadcast import broadcast_tensors
from ..comm.engine import DEFAULT_BUCKET_MIB
from ..comm.memory import keep_freed_memory
from ..comm.reducer import GradientReducer
from ..errors import UserError
from .backend_options import apply_backend_options, check_backend_options
from .control_plane import ControlPlane, GroupControlPlane, LocalControlPlane
from .reducer_options import ReducerOptions, check_seconds
from .rendezvous import connect_store, roll_call, start_default_group


@final
class FabricManualAllReduceStrategy(ParallelStrategy):
    """One process per device, each with a replica; buckets of gradients are averaged while the backward pass runs.

    At 2 ranks the result equals Fabric's DDP to the bit, unless a hook compresses. Limits:

    - All ranks run the same backward passes. Every module that was set up takes part in each of them, with a message
      of a few bytes if it got no gradients, so a module that is no longer used is best not set up in this process.
    - A parameter that is in two modules belongs to the one that was set up first, also for ``no_backward_sync``.
    - What a compressing hook has still to send is not in ``fabric.save``: a resumed run begins with nothing left over.

    Args:
        algorithm, bucket_mib, overlap, comm_hook, comm_state: See :class:`.ManualAllReduceStrategy`.
        process_group_backend, start_timeout_s, step_timeout_s, broadcast_buffers, keep_freed_memory,
            backend_options: See :class:`.CollectiveStrategy`.
        kwargs: See :class:`lightning.fabric.strategies.ParallelStrategy`.
    """

    strategy_name = "manual_allreduce"

    def __init__(
        self,
        algorithm: str = "auto",
        bucket_mib: float | str = DEFAULT_BUCKET_MIB,
        overlap: bool = True,
        comm_hook: str | Callable[..., Any] | None = None,
        comm_state: Any = None,
        process_group_backend: str | None = None,
        start_timeout_s: float = 120.0,
        step_timeout_s: float = 300.0,
        broadcast_buffers: bool = True,
        keep_freed_memory: bool = True,
        backend_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._backend_options = check_backend_options(backend_options, "backend_options")
        self._options = ReducerOptions(algorithm, bucket_mib, overlap, comm_hook, comm_state, step_timeout_s)
        check_seconds("start_timeout_s", start_timeout_s)
        if process_group_backend not in (None, "gloo", "nccl"):
            raise UserError(f"process_group_backend must be gloo or nccl, got {process_group_backend!r}")
        self.control: ControlPlane = LocalControlPlane()
        self._start_timeout = timedelta(seconds=start_timeout_s)
        self._process_group_backend = process_group_backend
        self._broadcast_buffers = broadcast_buffers
        self._keep_freed_memory = keep_freed_memory
        self._replicas: list[Replica] = []
        self._num_nodes = 1  # Fabric sets it
        self._backward_sync_control = _NoSync()

    # -- topology --------------------------------------------------------------------------------------------

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str:
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def _set_world_ranks(self) -> None:
        """Called by Fabric's constructor, so that its ranks are known before processes start."""
        environment = self.cluster_environment
        assert environment is not None
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(rank_zero_only, "rank", self.global_rank)  # noqa: B010 (a function attribute)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Meet the other processes and start the default group; called by ``fabric.launch``. Blocks."""
        super().setup_environment()
        self._set_world_ranks()
        backend = self.process_group_backend
        apply_backend_options(self._backend_options, backend, dist.is_initialized(), "backend_options")
        environment = self.cluster_environment
        assert environment is not None
        address, port, rank = environment.main_address, environment.main_port, self.global_rank
        shared, store = connect_store(address, port, rank, self._start_timeout)
        roll_call(store, rank, self.world_size, self._start_timeout)
        timeout = timedelta(seconds=self._options.step_timeout_s)
        start_default_group(shared, backend, rank, self.world_size, timeout, self.root_device)
        self.control = GroupControlPlane(self.root_device)

    @override
    def module_to_device(self, module: nn.Module) -> None:
        module.to(self.root_device)

    @override
    def setup_module(self, module: nn.Module) -> Replica:
        """Make all ranks' parameters and buffers those of rank 0. Blocks; ``module`` is on its device.

        Raises:
            UserError: the ranks hold different models, or an option does not work here.
        """
        if self._keep_freed_memory:
            keep_freed_memory()
        reducer = self._reducer_for(module)
        replica = Replica(module, reducer, self._broadcast_buffers)
        self._replicas.append(replica)
        return replica

    def _reducer_for(self, module: nn.Module) -> GradientReducer:
        if self._replicas and self._options.state_is_an_object:
            raise UserError(
                "comm_state is the state of one model, but a second one is set up: give its options "
                "(a mapping), so that every model gets a state of its own"
            )
        state = [*module.named_parameters(), *module.named_buffers()]
        try:
            check_same_model(state)
        except ModelMismatch as error:
            raise UserError(f"strategy manual_allreduce: {error}") from error
        broadcast_tensors(tensor for _, tensor in state)
        taken = {parameter for replica in self._replicas for parameter in replica.parameters()}
        own = [(name, parameter) for name, parameter in module.named_parameters() if parameter not in taken]
        return self._options.make_reducer(own, rank_zero_info)

    @override
    def teardown(self) -> None:
        for replica in self._replicas:
            replica.reducer.close()
        self._replicas.clear()
        super().teardown()

    # -- steps -----------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """As Fabric's, with gradients final on all ranks before ``precision.post_backward``."""
        self.precision.pre_backward(tensor, module)
        with ExitStack() as passes:
            for replica in self._replicas:
                passes.enter_context(replica.reducer.backward_pass())
            self.precision.backward(tensor, module, *args, **kwargs)
        self.precision.post_backward(tensor, module)

    # -- checkpoints: Fabric passes what setup_module returned -------------------------------------------------

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return super().get_module_state_dict(_original(module))

    @override
    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(_original(module), state_dict, strict)

    # -- control plane ---------------------------------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None) -> None:
        self.control.barrier(name)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.control.broadcast(obj, src)

    @override
    def all_reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor | Any:
        return _sync_ddp_if_available(tensor, group, reduce_op) if isinstance(tensor, Tensor) else tensor


@final
class Replica(nn.Module):
    """What ``fabric.setup`` wraps: shares buffers before a forward pass as DistributedDataParallel's wrapper does.

    A wrapper and no forward hook on the module, since Fabric sends a module's other forward methods
    (``mark_forward_method``, a LightningModule's ``training_step``) through the wrapper.
    """

    def __init__(self, module: nn.Module, reducer: GradientReducer, broadcast_buffers: bool) -> None:
        super().__init__()
        self.module = module
        self.reducer = reducer
        self._broadcast_buffers = broadcast_buffers
        self._buffers_due = True
        self._synchronizes = True

    @override
    @torch.compiler.disable(recursive=False)  # Fabric compiles this wrapper: the module yes, the broadcast no
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._broadcast_buffers and self._buffers_due:
            broadcast_tensors(self.module.buffers())
        output = self.module(*args, **kwargs)
        self._buffers_due = torch.is_grad_enabled() and self._synchronizes
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward and backward passes inside stay on this rank."""
        previous, self._synchronizes = self._synchronizes, False
        try:
            with self.reducer.no_sync():
                yield
        finally:
            self._synchronizes = previous


@final
class _NoSync(_BackwardSyncControl):
    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return nullcontext()
        if not isinstance(module, Replica):
            raise TypeError(f"no_backward_sync takes a module that fabric.setup returned, got {type(module).__name__}")
        return module.no_sync()


def _original(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, Replica) else module
