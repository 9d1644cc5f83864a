"""``--trainer.strategy parameter_server``: process 0 holds parameters and optimizer, the others train."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any, final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import zmq
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.server import ParameterServer, RemoteOptimizer, ServerStatistics, WorkerClient, WorkerFailed
from ..comm.server.naive import NaivePeers
from ..errors import UserError
from .collective import CollectiveStrategy
from .rendezvous import make_socket_folder, remove_socket_folder
from .server_launcher import ServerLauncher, ServingDone

_TRANSPORTS = ("auto", "shared_memory", "ipc", "tcp", "naive")
_BYE_LINGER_MS = 5000


@final
class ParameterServerStrategy(CollectiveStrategy):
    """Synchronous parameter server on one host: N processes are 1 server and N - 1 workers.

    Lightning's world is the workers: ``trainer.world_size`` is N - 1, ``trainer.is_global_zero`` is true in the
    first worker. Gradients are averaged, clipped and applied on the server; a worker's ``p.grad`` stays local.
    With 2 workers the result equals Lightning's DDP with 2 ranks to the bit.

    Args:
        transport: ``shared_memory`` (tensors in memory that all processes map, CPU only), ``ipc`` (ZeroMQ over a
            Unix socket), ``tcp`` (ZeroMQ over loopback) or ``naive`` (one blocking send and recv per parameter; the
            baseline). ``auto`` is ``shared_memory`` on the CPU, ``ipc`` elsewhere.
        part_mib: Size of a part in MiB: pushing, summing, stepping and pulling overlap part by part. By default what
            was fastest: 16 in shared memory, 4 on sockets.
        server_log_every_n_steps: How often the server prints what it does; 0 for never.
        kwargs: See :class:`CollectiveStrategy`.
    """

    strategy_name = "parameter_server"
    communicates_in_optimizer_step = True
    num_servers = 1

    def __init__(
        self, transport: str = "auto", part_mib: float | None = None, server_log_every_n_steps: int = 50, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if transport not in _TRANSPORTS:
            raise UserError(f"--trainer.strategy.transport must be one of {', '.join(_TRANSPORTS)}, got {transport!r}")
        if part_mib is not None and part_mib <= 0:
            raise UserError(f"--trainer.strategy.part_mib must be > 0 MiB, got {part_mib}")
        self.options = {"transport": transport, "part_mib": part_mib}
        self._log_every = server_log_every_n_steps
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._endpoint = ""
        self._client: WorkerClient | None = None
        self._naive: NaivePeers | None = None
        self._farewell: tuple[Any, Any] = ({}, {})

    # -- topology --------------------------------------------------------------------------------------------

    @property
    def process_rank(self) -> int:
        """Rank among all processes, the server's being 0."""
        return self.cluster_environment.global_rank() if self.cluster_environment is not None else 0

    @property
    def is_server(self) -> bool:
        return self.process_rank == 0

    @property
    @override
    def world_size(self) -> int:
        return self.num_nodes * self.num_processes - self.num_servers

    @property
    @override
    def global_rank(self) -> int:
        """Rank among the workers. The server takes the one after the last: rank-zero work is not its own."""
        return self.world_size if self.is_server else self.process_rank - 1

    @property
    @override
    def local_rank(self) -> int:
        return self.world_size if self.is_server else super().local_rank - 1

    @override
    def set_world_ranks(self) -> None:
        if self.num_nodes > 1:
            raise UserError("--trainer.strategy parameter_server runs on one host so far: set --trainer.num_nodes 1")
        if self.num_processes < 2:
            raise UserError(
                "--trainer.strategy parameter_server needs at least 2 processes (1 server and 1 worker): "
                f"set --trainer.devices 2 or more, got {self.num_processes}"
            )
        super().set_world_ranks()

    @override
    def _configure_launcher(self) -> None:
        self._launcher = ServerLauncher(self, self.cluster_environment, self.num_processes, self.num_nodes)

    @property
    def _part_mib(self) -> float:
        return self.options["part_mib"] or (16.0 if self._shares_memory else 4.0)

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
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER if self.is_server else zmq.DEALER)
        self._socket.set_hwm(0)  # what is under way is bounded by one step; dropping would lose gradients
        if self.is_server:
            self._socket.router_mandatory = True
            self._endpoint = self._bind()
            self._store.set("endpoint", self._endpoint)
        else:
            self.join_group()
            self._endpoint = self._store.get("endpoint").decode()
            self._socket.routing_id = str(self.global_rank).encode()
            self._socket.connect(self._endpoint)
        if self.options["transport"] == "naive":
            peers = dist.PrefixStore("naive", self._store)
            self._naive = NaivePeers(peers, self.process_rank, self.world_size + 1, self.start_timeout)

    def _bind(self) -> str:
        if self.options["transport"] == "tcp":
            return f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        endpoint = f"ipc://{make_socket_folder() / 'server'}"
        self._socket.bind(endpoint)
        return endpoint

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
            self._watch()
            time.sleep(0.05)

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "--trainer.precision 16-mixed does not work with --trainer.strategy parameter_server: a loss scaler "
                "may skip a step on one worker only; use bf16-mixed"
            )
        if self.is_server:
            self._serve(trainer)
            raise ServingDone
        super().setup(trainer)
        if self._client is None:
            self._client = self._connect([])

    def _refuse_unservable(self) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in self.optimizers):
            raise UserError(
                "LBFGS evaluates the model again within a step, which the parameter server cannot: "
                "use --trainer.strategy manual_allreduce or another optimizer"
            )

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

    def _connect(self, named_parameters: list[list[tuple[str, Tensor]]]) -> WorkerClient:
        client = WorkerClient(
            self._socket,
            named_parameters,
            self.global_rank,
            self.step_timeout.total_seconds(),
            self._part_mib,
            self.timeline,
            self._naive,
            self.num_processes if self._shares_memory else None,
        )
        client.start()
        return client

    @override
    def start_fitting(self) -> None:
        self._refuse_unservable()
        client = self._client = self._connect(self._named_parameters())
        self.optimizers = [RemoteOptimizer(inner, client, n) for n, inner in enumerate(self.optimizers)]
        # Lightning would clip each worker's own gradient; the average is what has to be clipped.
        self.precision_plugin.clip_gradients = self._clip_on_server  # pyright: ignore[reportAttributeAccessIssue]

    @override
    def stop_fitting(self) -> None:
        del self.precision_plugin.clip_gradients

    @override
    def accumulate_locally(self) -> Any:
        return torch.enable_grad()  # nothing travels before the optimizer steps

    @staticmethod
    def _clip_on_server(optimizer: Optimizer | Optimizable, clip_val: float = 0.0, algorithm: Any = "norm") -> None:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert isinstance(inner, RemoteOptimizer)
        if clip_val > 0:
            inner.clip_on_server(str(getattr(algorithm, "value", algorithm)), clip_val)

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
        self._refuse_unservable()
        server = ParameterServer(
            self._socket,
            self.optimizers,
            self._named_parameters(),
            self.world_size,
            self.step_timeout.total_seconds(),
            self._part_mib,
            self._watch,
            self._report,
            self._naive,
            self._shares_memory,
        )
        self._farewell = server.serve()
        server.release()

    def _watch(self) -> None:
        """Raise if a worker that we started has ended with an error."""
        launcher = self._launcher
        assert isinstance(launcher, ServerLauncher)
        if (ended := launcher.first_exit_code()) is not None:
            rank, code = ended
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerFailed(f"worker {rank - 1} {how}")

    def _report(self, statistics: ServerStatistics) -> None:
        if not self._log_every or statistics.total_steps % self._log_every:
            return
        means = statistics.take()
        print(
            f"server: step {means['total_steps']} | {means['steps_per_s']:.2f} steps/s | "
            f"{means['num_bytes'] / 1e6:.1f} MB in and out per step | receive {means['receive_ms']:.0f} ms, "
            f"reduce {means['reduce_ms']:.0f} ms, optimizer {means['optimizer_ms']:.0f} ms",
            flush=True,
        )

    # -- leaving ---------------------------------------------------------------------------------------------

    def leave(self, trainer: pl.Trainer, result: Any) -> None:
        """Worker: say bye; rank 0 hands over what the server's process should end with."""
        assert self._client is not None
        info, state = None, {}
        if self.is_global_zero:
            info = self._last_words(trainer, result)
            state = self._unserved_state() if trainer.state.fn == TrainerFn.FITTING else {}
        self._client.bye(info, state)
        self._close(_BYE_LINGER_MS)

    def _last_words(self, trainer: pl.Trainer, result: Any) -> dict[str, Any]:
        checkpoints = [c.state_dict() for c in trainer.checkpoint_callbacks]
        return {
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "checkpoints": [{k: s.get(k) for k in ("best_model_path", "last_model_path")} for s in checkpoints],
            "result": result if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING) else None,
        }

    def _unserved_state(self) -> dict[str, Tensor]:
        """What the server does not have: buffers and parameters without an optimizer."""
        assert self.lightning_module is not None
        served = {name for named in self._named_parameters() for name, p in named if p.requires_grad}
        return {k: v for k, v in self.lightning_module.state_dict().items() if k not in served}

    def hand_over(self, trainer: pl.Trainer) -> Any:
        """Server: put worker 0's last words into this process's trainer and model; returns the run's result."""
        info, state = self._farewell
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(state, strict=False)
        metrics = {name: torch.tensor(value) for name, value in info["metrics"].items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        for callback, paths in zip(trainer.checkpoint_callbacks, info["checkpoints"], strict=True):
            vars(callback).update({name: path for name, path in paths.items() if path is not None})
        self._close(0)
        return info["result"]

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other side why, then let go of everything without waiting."""
        if self._client is not None:
            self._client.fail(f"{type(exception).__name__}: {exception}")
        if self.is_server and self._launcher is not None:
            self._launcher.kill(signal.SIGTERM)
        self._close(1000)

    def _close(self, linger_ms: int) -> None:
        if self._context is not None:
            self._context.destroy(linger_ms)
            remove_socket_folder(self._endpoint)
        self._context = self._client = self._naive = None
