"""``--trainer.strategy sharded_server``: every rank trains, and serves a shard of the parameters."""

from __future__ import annotations

from typing import Any, final

import lightning.pytorch as pl
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.sharded import TRANSPORTS, ShardedOptimizer, ShardedServer, Unshardable, make_sharded_server
from ..comm.shared_memory import SharedMemoryError
from ..errors import UserError
from .averaging import refuse_averaging
from .collective import CollectiveStrategy

DEFAULT_BUCKET_MIB = 25.0


@final
class ShardedServerStrategy(CollectiveStrategy):
    """Every rank trains a replica and steps a shard: reduce-scatter of gradients, own step, all-gather of parameters.

    Optimizer state and the optimizer's time are divided by the number of ranks. ``p.grad`` is the average in the own
    slices only. At 2 ranks the result equals Lightning's DDP to the bit, with clipping by norm within rounding.

    Args:
        transport: ``shared_memory`` (CPU, ranks on one host), ``collective`` (the backend's reduce-scatter and
            all-gather), or ``auto``: the first where it can run.
        bucket_mib: A bucket is full when it reaches so many MiB.
        overlap: Reduce during the backward pass (true) or after it (false).
        share_parameters: All ranks of this host read the same parameters in place, which saves a copy per step. For
            models whose weights nobody but the optimizer changes: callbacks that swap weights (averages) would do it on
            all ranks at once.
        kwargs: See :class:`CollectiveStrategy`.
    """

    strategy_name = "sharded_server"

    def __init__(
        self,
        transport: str = "auto",
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        overlap: bool = True,
        share_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if transport not in TRANSPORTS:
            raise UserError(f"--trainer.strategy.transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        if not 0 < bucket_mib < float("inf"):
            raise UserError(f"--trainer.strategy.bucket_mib must be > 0 MiB, got {bucket_mib}")
        self.options = {"transport": transport, "bucket_mib": bucket_mib, "overlap": overlap}
        self.options["share_parameters"] = share_parameters
        self._transport = transport
        self._server: ShardedServer | None = None

    # -- life cycle ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "--trainer.precision 16-mixed does not work with --trainer.strategy sharded_server: a loss scaler "
                "would look at one rank's gradients only; use bf16-mixed"
            )
        if self.options["share_parameters"]:
            refuse_averaging(trainer, "--trainer.strategy.share_parameters", "leave it out")
        super().setup(trainer)

    @override
    def start_fitting(self) -> None:
        assert self.model is not None
        try:
            self._server = make_sharded_server(
                self.model.named_parameters(),
                self.optimizers,
                self.options["bucket_mib"],
                self.options["overlap"],
                self._transport,
                self.options["share_parameters"],
                self.step_timeout.total_seconds(),
                self.timeline,
                rank_zero_info,
            )
        except (Unshardable, SharedMemoryError) as error:
            raise UserError(f"strategy sharded_server: {error}") from error
        self.options["transport"] = self._server.transport_name
        self.optimizers = list(self._server.optimizers)
        # Lightning would clip by the norm of this rank's own gradients, most of which are no averages.
        self.precision_plugin.clip_gradients = self._clip  # pyright: ignore[reportAttributeAccessIssue]

    @override
    def stop_fitting(self) -> None:
        del self.precision_plugin.clip_gradients
        assert self._server is not None
        self._server.close()
        self._server = None

    # -- steps -----------------------------------------------------------------------------------------------

    @override
    def accumulate_locally(self) -> Any:
        assert self._server is not None
        return self._server.no_sync()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._server is not None
        try:
            return self.backward_within(self._server.backward_pass(), closure_loss, optimizer, *args, **kwargs)
        except Unshardable as error:
            raise UserError(str(error)) from error

    @staticmethod
    def _clip(optimizer: Optimizer | Optimizable, clip_val: float = 0.0, algorithm: Any = "norm") -> None:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert isinstance(inner, ShardedOptimizer)
        if clip_val > 0:
            inner.clip(str(getattr(algorithm, "value", algorithm)), float(clip_val))
