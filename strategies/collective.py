"""The part that our strategies share: topology, process group, set-up order, buffers, control plane."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.agreement import ModelMismatch, check_same_model
from ..comm.diagnosis import stand
from ..comm.memory import keep_freed_memory
from ..comm.silence import limit_silence
from ..comm.timeline import Timeline
from ..errors import UserError
from .backend_options import apply_backend_options, check_backend_options
from .control_plane import ControlPlane, GroupControlPlane, LocalControlPlane
from .interface import use_interface_towards
from .profiling import show_in_profiler
from .rendezvous import connect_store, roll_call, start_default_group


class CollectiveStrategy(ParallelStrategy):
    """One process per device, replicas kept equal by a concrete strategy. Works on CPU (gloo) and CUDA (NCCL).

    Subclasses implement :meth:`start_fitting`, :meth:`stop_fitting`, and one of Lightning's step hooks
    (``backward``, ``optimizer_step``) in which gradients travel.

    Args:
        process_group_backend: ``gloo`` or ``nccl``; by default what suits the device.
        start_timeout_s: Seconds that a process waits at the start for the others to arrive.
        step_timeout_s: Seconds that a rank waits for the others in one operation of a run before it gives up.
        broadcast_buffers: Give every rank rank 0's buffers (BatchNorm statistics) before a forward pass that
            follows a synchronizing step, as DDP does.
        keep_freed_memory: Tell glibc not to give freed memory back to the kernel between steps, since the next step
            needs it again; no effect where ``MALLOC_*`` or ``GLIBC_TUNABLES`` is set.
        backend_options: Environment variables of gloo or NCCL, such as ``{"NCCL_ALGO": "Ring"}``, set before the
            process group starts; see :mod:`.backend_options`.
    """

    is_distributed = True  # or Lightning injects no DistributedSampler and ignores sync_dist
    strategy_name: str
    communicates_in_optimizer_step = False
    averages_gradients = False
    """Whether every rank holds the same, averaged gradients when the optimizer steps."""
    in_lockstep = True
    """Whether all ranks take part in every step, so that a step may hold collectives."""

    def __init__(
        self,
        process_group_backend: str | None = None,
        start_timeout_s: float = 120.0,
        step_timeout_s: float = 300.0,
        broadcast_buffers: bool = True,
        keep_freed_memory: bool = True,
        backend_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backend_options = check_backend_options(backend_options)
        for name, value in (("start_timeout_s", start_timeout_s), ("step_timeout_s", step_timeout_s)):
            if value <= 0:
                raise UserError(f"--trainer.strategy.{name} must be > 0 seconds, got {value}")
        if process_group_backend not in (None, "gloo", "nccl"):
            raise UserError(
                f"--trainer.strategy.process_group_backend must be gloo or nccl, got {process_group_backend!r}"
            )
        self.timeline = Timeline()
        self.control: ControlPlane = LocalControlPlane()
        self.start_timeout = timedelta(seconds=start_timeout_s)
        self.step_timeout = timedelta(seconds=step_timeout_s)
        self._process_group_backend = process_group_backend
        self._broadcast_buffers = broadcast_buffers
        self._keep_freed_memory = keep_freed_memory
        self._buffers_due = True
        self._accumulating = False
        self._num_nodes = 1

    # -- what a concrete strategy adds -----------------------------------------------------------------------

    @abstractmethod
    def start_fitting(self) -> None:
        """Prepare communication: the model is on its device, equal on all ranks, optimizers exist."""

    @abstractmethod
    def stop_fitting(self) -> None:
        """Undo :meth:`start_fitting`; called once for it, also after an exception. Must not block on peers."""

    def accumulate_locally(self) -> Any:
        """Context manager in which backward passes do not communicate (gradient accumulation)."""
        raise NotImplementedError

    # -- topology --------------------------------------------------------------------------------------------

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        assert self.cluster_environment is not None
        return self.parallel_devices[self.cluster_environment.local_rank()]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # A process beyond the world (the parameter server) never draws samples: any rank's sampler will do.
        return {"num_replicas": self.world_size, "rank": self.global_rank % self.world_size}

    @property
    def store(self) -> dist.Store:
        """What all processes of the run share, the parameter server's included; there once they have met."""
        return self._store

    @property
    def steps_ahead(self) -> int | None:
        """How many steps ahead of rank 0 another rank can be; None: any number."""
        return 1 if self.root_device.type == "cpu" else 8  # a launch queue holds about a thousand kernels

    @property
    def process_group_backend(self) -> str:
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def set_world_ranks(self) -> None:
        """Called by the Trainer's constructor and before the process group starts."""
        environment = self.cluster_environment
        if environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + environment.local_rank())
            environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(rank_zero_only, "rank", self.global_rank)  # noqa: B010 (a function attribute)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        apply_backend_options(self.backend_options, self.process_group_backend, dist.is_initialized())
        self.connect_processes()

    def connect_processes(self) -> None:
        """Meet the other processes; start the default process group and the control plane on it. Blocks."""
        self.join_store()
        self.join_group()

    def join_store(self) -> None:
        """Connect to the store that process 0 hosts."""
        environment = self.cluster_environment
        assert environment is not None
        address, port = environment.main_address, environment.main_port
        if self.num_nodes > 1:
            use_interface_towards(address)
        self._shared, self._store = connect_store(address, port, environment.global_rank(), self.start_timeout)
        self._notice_cut_link()

    def _notice_cut_link(self) -> None:
        """To the store, which waits for an answer without a limit of its own. Again when callbacks have connected."""
        if self.num_nodes > 1:
            assert self.cluster_environment is not None
            limit_silence(self.cluster_environment.main_port, self.step_timeout.total_seconds())

    def join_group(self) -> None:
        """Wait for the other training processes and form the default group with them."""
        rank, size = self.global_rank, self.world_size
        roll_call(self._store, rank, size, self.start_timeout)
        start_default_group(self._shared, self.process_group_backend, rank, size, self.step_timeout, self.root_device)
        self.control = GroupControlPlane(self.root_device)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._notice_cut_link()
        self.prepare_model(trainer)
        assert self.model is not None
        self._check_same_model()
        self.control.share(self._state())
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._buffers_due = True
            if self._keep_freed_memory:
                keep_freed_memory()
            self.start_fitting()
            self._fitting = True

    _fitting = False

    def prepare_model(self, trainer: pl.Trainer) -> None:
        """Convert the module and move it to its device; nothing here talks to another rank."""
        assert self.accelerator is not None
        assert self.model is not None
        show_in_profiler(self, trainer)
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            if self.root_device.type == "cpu":
                raise UserError("--trainer.sync_batchnorm needs CUDA: torch's SyncBatchNorm has no CPU version")
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()

    def _check_same_model(self) -> None:
        assert self.model is not None
        try:
            named = [*self.model.named_parameters(), *self.model.named_buffers()]
            check_same_model(named, self.control.all_gather_bytes)
        except ModelMismatch as error:
            raise UserError(str(error)) from error

    def _state(self) -> list[Tensor]:
        assert self.model is not None
        return [*self.model.parameters(), *self.model.buffers()]

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def teardown(self) -> None:
        if self._fitting:
            self._fitting = False
            self.stop_fitting()
            if self._layer_sync is not None and self.model is not None:
                self.model = self._layer_sync.revert(self.model)
        super().teardown()

    # -- steps -----------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        self._accumulating = True
        try:
            with self.accumulate_locally():
                yield
        finally:
            self._accumulating = False

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # As Lightning's DDP, which under manual optimization broadcasts before the first forward only.
        assert self.lightning_module is not None
        stand(step=str(self.lightning_module.global_step))
        if self.in_lockstep:
            self._share_buffers(due_next=not self._accumulating and self.lightning_module.automatic_optimization)
        else:
            self._buffers_due = True
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._fitting:  # so that all ranks evaluate the same model
            self._share_buffers(due_next=False)
        return super().validation_step(*args, **kwargs)

    def backward_within(
        self,
        synchronizing: AbstractContextManager[None],
        closure_loss: Tensor,
        optimizer: Optimizer | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As Lightning's ``backward``, with gradients final between the backward pass and ``post_backward``."""
        module, plugin = self.lightning_module, self.precision_plugin
        assert module is not None
        self.pre_backward(closure_loss)
        closure_loss = plugin.pre_backward(closure_loss, module)
        with synchronizing:
            plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        closure_loss = plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _share_buffers(self, due_next: bool) -> None:
        """Broadcast rank 0's buffers if a synchronizing training step came before, as DDP's forward does."""
        if self._broadcast_buffers and self._buffers_due:
            assert self.model is not None
            self.control.share(self.model.buffers(), self._rank_with_buffers())
        self._buffers_due = due_next

    def _rank_with_buffers(self) -> int:
        """Whose buffers all ranks take over."""
        return 0

    # -- control plane ---------------------------------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None) -> None:
        self.control.barrier(name)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.control.broadcast(obj, src)

    @override
    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor | Any:
        return self.control.reduce(tensor, group, reduce_op) if isinstance(tensor, Tensor) else tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return self.control.all_gather(tensor, group, sync_grads)
