"""``--trainer.strategy parameter_server``: process 0 holds parameters and optimizer, the others train."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.optimizers import is_elementwise
from ..comm.server import RemoteOptimizer, ServersClient, WorkerClient, WorkerGrowth
from ..comm.server.ledger import Loss, identity
from ..comm.server.servers_client import Named, name_pieces, pieces_of
from ..comm.server.shards import Cut, spread
from ..comm.stop import StopAgreement
from ..comm.tracer import Tracer
from ..errors import StoppedBySignal, UserError
from ..processes import is_supervised
from .continuation import Continuation
from .last_words import last_words, take_over
from .metric_sync import MetricSync
from .rendezvous import roll_call
from .served_world import ServedWorldStrategy
from .server_connection import ServerConnection
from .server_launcher import ServerLauncher, ServingDone
from .server_options import LOOPBACK, ServerOptions, default_part_mib
from .server_refusals import refuse_hosts, refuse_optimizers, refuse_settings, warn_of_no_effect
from .server_tensorboard import announce
from .serving import PROGRESS_KEY, Serving
from .store_control_plane import StoreControlPlane
from .worker_return import ask_for_position, incarnation

_BYE_LINGER_MS = 60_000
"""How long a worker that leaves may take to hand over the weights. It ends as soon as they are sent."""
_TRACE_KEY = "trace folder"


@final
class ParameterServerStrategy(ServedWorldStrategy):
    """Parameter server: N processes are S servers, all on the first host, and N - S workers.

    Lightning's world is the workers: ``trainer.world_size`` is N - S, ``trainer.is_global_zero`` is true in the
    first worker. Gradients are clipped and applied on the server; a worker's ``p.grad`` stays local.
    In mode ``sync`` they are averaged first; with 2 workers the result equals Lightning's DDP with 2 ranks to the bit.

    Args:
        servers: How many processes serve. Each has whole parameters, spread evenly by bytes; one larger than an even
            share is cut if the optimizer is elementwise.
        share_parameters: Workers read the server's parameters in place instead of copying them after every step
            (sync mode, shared memory): what one worker changes by hand, all see at once.
        mode: ``sync``: all workers take part in every step. ``async``: each worker's gradient is a step of its own as
            soon as it arrives, and nobody waits. ``bounded``: the same, but nobody begins a step when it is more than
            ``staleness`` steps ahead of the slowest worker.
        staleness: The bound, 4 by default; 0 is mode ``sync``.
        staleness_correction: Divide the learning rate of a gradient by 1 + the steps that others took meanwhile.
        record_schedule: A JSON file for the order of workers in which gradients were applied.
        replay_schedule: Such a file: apply them in this order, so that a run is repeated to the bit.
        transport: ``shared_memory`` (tensors in memory that all processes map, CPU only), ``ipc`` (ZeroMQ over a
            Unix socket), ``tcp`` (ZeroMQ over ``host``), ``collective`` (a reduce to the server and a broadcast from it
            by ``process_group_backend``) or ``naive`` (one blocking send and recv per parameter; the baseline).
            ``auto`` is ``shared_memory`` on the CPU, ``ipc`` elsewhere. Several hosts need ``tcp``.
        part_mib: Size of a part in MiB: pushing, summing, stepping and pulling overlap part by part. By default what
            was fastest: 16 in shared memory, 4 on sockets; as DDP's buckets, 25, with ``collective``.
        wire_dtype: ``float32``, ``bfloat16`` or ``float16``: gradients and parameters of wider floats travel in it.
            Workers compute with parameters rounded to it; the server, checkpoints and the final weights hold them
            unrounded. By default they travel as they are.
        server_log_every_n_steps: How often the server prints what it does, and writes it to TensorBoard if the trainer
            has a TensorBoardLogger; 0 for neither.
        host: The IPv4 address on which the server listens with ``transport: tcp``; off loopback it needs ``keys``.
        keys: A folder of ``gradsync keygen``, for ``transport: tcp``: who does not have them is refused, and what
            travels is encrypted.
        on_worker_loss: ``stop``: the run ends when a worker does. ``continue``: it goes on with the others, as long as
            the first worker is there, which logs and saves. A worker is lost when its process has ended, or has said
            nothing for 5 s; what it had not pushed is not seen in this epoch.
        max_replacements: With ``continue``, in mode ``sync``: start so many new processes in all, each in the place of
            a lost worker. It takes part from a step of the first worker on, and in barriers and metrics from the next
            epoch on.
        kwargs: See :class:`CollectiveStrategy`.
    """

    strategy_name = "parameter_server"
    communicates_in_optimizer_step = True

    def __init__(
        self,
        transport: str = "auto",
        part_mib: float | None = None,
        server_log_every_n_steps: int = 50,
        servers: int = 1,
        share_parameters: bool = False,
        mode: str = "sync",
        staleness: int | None = None,
        staleness_correction: bool = False,
        record_schedule: str | Path | None = None,
        replay_schedule: str | Path | None = None,
        wire_dtype: str | None = None,
        host: str = LOOPBACK,
        keys: str | Path | None = None,
        on_worker_loss: str = "stop",
        max_replacements: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        record, replay = (Path(path) if path else None for path in (record_schedule, replay_schedule))
        self._options = ServerOptions(
            transport=transport,
            part_mib=part_mib,
            servers=servers,
            share_parameters=share_parameters,
            mode=mode,
            staleness=staleness,
            staleness_correction=staleness_correction,
            record_schedule=record,
            replay_schedule=replay,
            wire_dtype=wire_dtype,
            host=host,
            keys=Path(keys) if keys else None,
            on_worker_loss=on_worker_loss,
            max_replacements=max_replacements,
        )
        self.options = self._options.shown()
        self.num_servers = servers
        self.steps_together = self._options.is_sync
        self.in_lockstep = self.steps_together and not self._options.goes_on
        self.workers_may_be_lost = self._options.goes_on
        self._continuation: Continuation | None = None
        self._metric_sync: MetricSync | None = None
        self._log_every = server_log_every_n_steps
        self._connection: ServerConnection | None = None
        self._client: ServersClient | None = None
        self._farewell: tuple[Any, Any] = ({}, {})

    @property
    def incarnation(self) -> int:
        """How many processes were this worker before, in this run."""
        return incarnation()

    @override
    def _configure_launcher(self) -> None:
        refuse_hosts(self._options, self.num_nodes)
        self._launcher = ServerLauncher(self, self.cluster_environment, self.num_processes, self.num_nodes)

    # -- what options come to -------------------------------------------------------------------------------

    @property
    def _part_mib(self) -> float:
        return self._options.part_mib or default_part_mib(self.options["transport"], self._shares_memory)

    @property
    def _shares_parameters(self) -> bool:
        if self._options.share_parameters and not self._shares_memory:
            raise UserError(
                "--trainer.strategy.share_parameters needs parameters on the CPU: leave it out, or "
                "--trainer.accelerator cpu"
            )
        return self._options.share_parameters

    @property
    def _shares_memory(self) -> bool:
        on_cpu = self.root_device.type == "cpu"
        if self.options["transport"] == "shared_memory" and not on_cpu:
            raise UserError(
                "--trainer.strategy.transport shared_memory needs parameters on the CPU: use ipc, or "
                "--trainer.accelerator cpu"
            )
        return self.options["transport"] == "shared_memory" or (self.options["transport"] == "auto" and on_cpu)

    # -- connecting ------------------------------------------------------------------------------------------

    @override
    def connect_processes(self) -> None:
        """The server binds its socket and hosts the store; the workers form the default group among themselves."""
        self.join_store()
        connection = self._connection = ServerConnection(
            self._store, self.process_rank, self.num_servers, self._options.keys
        )
        if self.is_server:
            connection.bind(self.options["transport"] == "tcp", self._options.host, self.world_size)
            if self.process_rank > 0:
                connection.watch([0], speaks_for=[])
        else:
            connection.find()
            connection.watch(range(self.num_servers), self.servers_to_tell_of())
            self.join_workers()
            connection.connect(identity(self.global_rank, self.incarnation))
        timeouts = (self.start_timeout, self.step_timeout)
        connection.meet_peers(self.options["transport"], self.world_size, self.process_group_backend, *timeouts)

    @property
    @override
    def steps_ahead(self) -> int | None:
        if self._options.is_sync:
            return super().steps_ahead
        return None if self._options.bound is None else self._options.bound + 2

    def join_workers(self) -> None:
        """Wait for the other workers. Those at different paces, or that may be lost, have no group."""
        if self.in_lockstep:
            self.join_group()
            return
        if self.incarnation == 0:
            roll_call(self._store, self.global_rank, self.world_size, self.start_timeout)
        store, timeout_s = dist.PrefixStore("workers", self._store), self.step_timeout.total_seconds()
        stopped = StopAgreement(self._store, None, None).decided
        if self._options.goes_on:
            self._continuation = Continuation(self._store, self.global_rank, self.world_size)
        control = StoreControlPlane(
            store, self.global_rank, self.world_size, timeout_s, self._progress, stopped, self.lost_ranks
        )
        self._metric_sync = MetricSync(control.gather_tensors)
        if self._continuation is not None:
            self._continuation.agree_through(
                control,
                admit=lambda worker: self._client.admit(worker) if self._client is not None else None,
                join=lambda: self._agree_through(control),
            )
        if self.incarnation == 0:
            self.control = control

    def _agree_through(self, control: StoreControlPlane) -> None:
        """This process, new in the place of a lost worker, is counted in by the others."""
        assert self._metric_sync is not None
        assert self.lightning_module is not None
        self.control = control
        self._metric_sync.attach(self.lightning_module)

    def ask_for_position(self) -> str:
        """New process in the place of a lost worker: the checkpoint to begin from. Blocks."""
        self.join_store()
        self._has_store = True
        return ask_for_position(self._store, self.global_rank, self.step_timeout)

    _has_store = False

    @override
    def join_store(self) -> None:
        if not self._has_store:
            super().join_store()
        self._has_store = False

    @property
    def num_updates(self) -> int:
        """How many optimizer steps the servers had made in this fit, all workers' together, when they last answered."""
        return self._client.num_updates if self._client is not None else 0

    def losses(self) -> list[Loss]:
        """Workers that the run has gone on without."""
        return self._continuation.losses() if self._continuation is not None else []

    def lost_ranks(self) -> set[int]:
        """See :meth:`.Continuation.lost_ranks`."""
        return self._continuation.lost_ranks() if self._continuation is not None else set()

    def _progress(self) -> bytes:
        return self._store.get(PROGRESS_KEY) if self._store.check([PROGRESS_KEY]) else b""

    @override
    def barrier(self, name: str | None = None) -> None:
        super().barrier(name)
        # The server sets up data and model as well, and must not look at data before it is prepared.
        if name == "pre_setup" and self.global_rank == 0:
            self._store.set("prepared", "yes")
        elif name == "pre_setup" and self.is_server:
            self._wait_for_key("prepared")

    def _wait_for_key(self, key: str) -> None:
        """Without a limit, as Lightning's own barrier around ``prepare_data``; ends if a worker does."""
        while not self._store.check([key]):
            self._make_serving().watch()
            time.sleep(0.05)

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        refuse_settings(self._options, trainer, self.precision_plugin)
        if self.is_server:
            self._serve(trainer)
            raise ServingDone
        super().setup(trainer)
        if self._client is None:
            self._client = self._connect([], [])  # an evaluation: optimizers of an earlier fit are not served
        if self._continuation is not None and trainer.state.fn == TrainerFn.FITTING:
            self._continuation.attach(trainer)
        if self._metric_sync is not None and self.incarnation == 0:
            assert self.lightning_module is not None
            self._metric_sync.attach(self.lightning_module)

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._metric_sync is not None:
            self._metric_sync.detach()
        if self._continuation is not None and self.lightning_module is not None:
            self._continuation.detach(self.lightning_module.trainer)

    def _named_parameters(self) -> list[list[tuple[str, Tensor]]]:
        """Per optimizer, its parameters in order with their names in the module."""
        assert self.model is not None
        names = {p: name for name, p in self.model.named_parameters()}
        return [
            [
                (names.get(p, f"optimizer {number}, parameter {index}"), p)
                for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
            ]
            for number, optimizer in enumerate(self.optimizers)
        ]

    def _cut(self) -> list[list[list[Cut]]]:
        """Per optimizer and server, what it serves: computed alike in every process."""
        return [
            spread([p for _, p in named], self.num_servers, is_elementwise(optimizer) and not self._shares_parameters)
            for optimizer, named in zip(self.optimizers, self._named_parameters(), strict=True)
        ]

    def _connect(self, named: list[Named], cuts: list[list[list[Cut]]]) -> ServersClient:
        """To all servers; blocks until they have seen all workers. See :class:`.ServersClient` for the arguments."""
        assert self._connection is not None
        pieces = [pieces_of(named, cuts, server) for server in range(self.num_servers)]
        clients = [
            WorkerClient(
                socket,
                name_pieces(named, own),
                self.global_rank,
                self.step_timeout.total_seconds(),
                self._part_mib,
                self.timeline,
                self._connection.peers,
                self.world_size if self._shares_memory else None,
                self.steps_together,
                self._options.dtype_on_wire,
                self._shares_parameters,
                not self._options.goes_on,
            )
            for socket, own in zip(self._connection.sockets, pieces, strict=True)
        ]
        client = ServersClient(clients, pieces, cuts, [[p for _, p in own] for own in named], self.timeline)
        client.start()
        return client

    @override
    def start_fitting(self) -> None:
        refuse_optimizers(self.optimizers)
        warn_of_no_effect(self._options, (p for named in self._named_parameters() for _, p in named if p.requires_grad))
        if self.is_global_zero and self.timeline.tracer.folder is not None:
            self._store.set(_TRACE_KEY, self.timeline.tracer.folder)
        client = self._client = self._connect(self._named_parameters(), self._cut())
        assert self.model is not None
        if self.incarnation > 0:
            client.fetch()
        growth = WorkerGrowth(
            client, self.optimizers, self.model.named_parameters(), self.num_servers, not self._shares_parameters
        )
        self.optimizers = [RemoteOptimizer(inner, client, n, growth) for n, inner in enumerate(self.optimizers)]
        if self.steps_together:  # Lightning would clip each worker's own gradient, not the average
            self.precision_plugin.clip_gradients = self._clip_on_server  # pyright: ignore[reportAttributeAccessIssue]

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        if self.is_global_zero:
            announce(self._store, self.lightning_module.trainer)

    @override
    def stop_fitting(self) -> None:
        vars(self.precision_plugin).pop("clip_gradients", None)

    @override
    def accumulate_locally(self) -> Any:
        return torch.enable_grad()  # nothing travels before the optimizer steps

    @staticmethod
    def _clip_on_server(optimizer: Optimizer | Optimizable, clip_val: float = 0.0, algorithm: Any = "norm") -> None:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert isinstance(inner, RemoteOptimizer)
        if clip_val > 0:
            inner.clip_on_server(str(getattr(algorithm, "value", algorithm)), clip_val)

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._continuation is not None:
            assert self._client is not None
            self._client.count_samples(extract_batch_size(batch))
        return super().training_step(batch, *args, **kwargs)

    def samples_since_last_call(self) -> int:
        """See :meth:`.Continuation.samples_since_last_call`."""
        assert self._client is not None
        assert self._continuation is not None
        return self._continuation.samples_since_last_call(self._client, self.control)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._fitting and self._buffers_due and not self.in_lockstep:
            self.control.barrier()  # all have ended their epoch: nobody changes the parameters any more
            self._fetch()
        return super().validation_step(*args, **kwargs)

    @override
    def _rank_with_buffers(self) -> int:
        """Of workers at different paces the last one to step: statistics of the others are of older parameters."""
        if self.in_lockstep:
            return 0
        assert self._client is not None
        own = f"{self._client.version} {self.global_rank}".encode()
        versions = [tuple(map(int, data.split())) for data in self.control.all_gather_bytes(own)]
        return max(versions, key=lambda version: version[0])[1]

    def _fetch(self) -> None:
        assert self._client is not None
        self._client.fetch()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """For a checkpoint: in mid-epoch others may have gone on, so ask the servers."""
        if self._fitting and self._options.wire_dtype is not None:
            return self._exact_state_dict()
        if self._fitting and not self.in_lockstep:
            self._fetch()
        return super().lightning_module_state_dict()

    def _exact_state_dict(self) -> dict[str, Any]:
        """As the servers have it; here, parameters stay rounded, or how often one saves would change the run."""
        if self.in_lockstep and not self.is_global_zero:
            return super().lightning_module_state_dict()  # nobody keeps it
        assert self._client is not None
        self._client.fetch(exact=True)
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in super().lightning_module_state_dict().items()}
        self._client.round()
        return state

    # -- checkpoints -----------------------------------------------------------------------------------------

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state on the server; only rank 0, which writes checkpoints, asks for it."""
        return super().optimizer_state(optimizer) if self.is_global_zero else {"state": {}, "param_groups": []}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            assert isinstance(optimizer, RemoteOptimizer)
            if self.is_global_zero:
                optimizer.load_state_dict(state)
            else:
                optimizer.load_settings(state)

    # -- the server ------------------------------------------------------------------------------------------

    def _serve(self, trainer: pl.Trainer) -> None:
        """Build model and optimizers as a worker does, then serve until all workers have left."""
        self.prepare_model(trainer)
        self.optimizers = []  # those of an earlier fit are not served in an evaluation
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self.setup_precision_plugin()
            _optimizers_to_device(self.optimizers, self.root_device)
        refuse_optimizers(self.optimizers)
        assert self.model is not None
        by_name = dict(self.model.named_parameters())
        serving = self._make_serving()
        serving.tracer = self._tracer_of_server()
        self._farewell = serving.serve(self.optimizers, self._named_parameters(), self._cut(), by_name)
        assert self._connection is not None
        self._connection.await_farewells()
        if self._farewell[0] is None:  # workers that have trained to the end say more
            signum = StopAgreement(self._store, None, None).decided()
            assert signum is not None
            raise StoppedBySignal(signum, None)

    def _tracer_of_server(self) -> Tracer:
        """If traces are recorded, to where the first worker does: by default folders carry the time."""
        tracer = self.timeline.tracer
        if tracer.on_request is not None:
            self._wait_for_key(_TRACE_KEY)
            tracer.on_request.open(self._store.get(_TRACE_KEY).decode())
        return tracer

    def _make_serving(self) -> Serving:
        launcher = self._launcher
        assert isinstance(launcher, ServerLauncher)
        assert self._connection is not None
        return Serving(
            self._options,
            self.process_rank,
            self._store,
            self._connection.sockets[0],
            self.world_size,
            self.step_timeout,
            self._part_mib,
            self._shares_memory,
            self._log_every,
            launcher,
            self._connection.peers,
        )

    # -- leaving ---------------------------------------------------------------------------------------------

    def leave(self, trainer: pl.Trainer, result: Any) -> None:
        """Worker: say bye; rank 0 hands over what the server's process should end with."""
        assert self._client is not None
        if trainer.state.fn == TrainerFn.FITTING:
            self._take_final_weights()
        info, state = None, {}
        if self.is_global_zero:
            info = last_words(trainer, result)
            # all of it: callbacks may have changed in this process what the servers have (averaged weights)
            assert self.lightning_module is not None
            state = self.lightning_module.state_dict() if trainer.state.fn == TrainerFn.FITTING else {}
        assert self._connection is not None
        self.losses()  # those of the last step, for whoever asks after the run
        self._connection.stop_watching()  # a server that has seen all workers leave ends
        self._client.bye(info, state)
        self._close(_BYE_LINGER_MS)

    def _take_final_weights(self) -> None:
        assert self._client is not None
        if not self.in_lockstep:
            self.control.barrier()  # all have pushed their last
        if not self.in_lockstep or self._options.wire_dtype is not None:
            self._client.fetch(exact=True)

    def hand_over(self, trainer: pl.Trainer) -> Any:
        """Server: put worker 0's last words into this process's trainer and model; returns the run's result."""
        words, state = self._farewell
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(state, strict=False)
        self._close(0)
        return take_over(trainer, words)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other side why, then let go of everything without waiting."""
        if isinstance(exception, StoppedBySignal):
            self._stop_in_good_order()
            return
        if self._client is not None:
            self._client.fail(f"{type(exception).__name__}: {exception}")
        if self._connection is not None and self._connection.peers is not None:
            self._connection.peers.abort()
        if isinstance(self._launcher, ServerLauncher) and not is_supervised():  # killed here, one would look failed
            self._launcher.end_children()
        self._close(1000)

    def _stop_in_good_order(self) -> None:
        if self._client is not None and self._connection is not None:
            self._connection.stop_watching()
            self._client.bye()
        self._close(_BYE_LINGER_MS)

    def _close(self, linger_ms: int) -> None:
        if self._continuation is not None:
            self._continuation.close()
        if self._client is not None:
            self._client.release()
        if self._connection is not None:
            self._connection.close(linger_ms)
        self._connection = self._client = None
