"""``--trainer.strategy manual_allreduce``: our own reducer averages gradients during the backward pass."""

from __future__ import annotations

from typing import Any, final

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.allreduce import ALGORITHMS
from ..comm.reducer import GradientReducer
from ..errors import UserError
from .collective import CollectiveStrategy


@final
class ManualAllReduceStrategy(CollectiveStrategy):
    """Every rank trains a replica; buckets of gradients are averaged with an all-reduce of your choice.

    At 2 ranks the result equals Lightning's DDP to the bit.

    Args:
        algorithm: ``native`` (the backend's all-reduce per bucket) or ``naive`` (a blocking one per parameter).
        bucket_mib: Largest bucket in MiB.
        overlap: Reduce during the backward pass (true) or after it (false).
        kwargs: See :class:`CollectiveStrategy`.
    """

    strategy_name = "manual_allreduce"

    def __init__(
        self, algorithm: str = "native", bucket_mib: float = 25.0, overlap: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if algorithm not in ALGORITHMS:
            raise UserError(f"--trainer.strategy.algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if bucket_mib <= 0:
            raise UserError(f"--trainer.strategy.bucket_mib must be > 0 MiB, got {bucket_mib}")
        self.options = {"algorithm": algorithm, "bucket_mib": bucket_mib, "overlap": overlap}
        self._reducer: GradientReducer | None = None

    @override
    def start_fitting(self) -> None:
        assert self.model is not None
        # Private groups: on the default one Lightning's and torchmetrics' collectives may interleave with ours.
        gradient_group = dist.new_group(timeout=self.step_timeout)
        control_group = dist.new_group(timeout=self.step_timeout, backend="gloo")
        assert isinstance(gradient_group, dist.ProcessGroup)
        assert isinstance(control_group, dist.ProcessGroup)
        self._groups = [gradient_group, control_group]
        self._reducer = GradientReducer(
            self.model.named_parameters(),
            ALGORITHMS[self.options["algorithm"]](gradient_group),
            control_group,
            bucket_mib=self.options["bucket_mib"],
            overlap=self.options["overlap"],
            timeline=self.timeline,
        )

    @override
    def stop_fitting(self) -> None:
        assert self._reducer is not None
        self._reducer.close()
        for group in self._groups if self._reducer.idle else ():  # destroying a busy one waits for the peer
            dist.destroy_process_group(group)
        self._reducer = None

    @override
    def accumulate_locally(self) -> Any:
        assert self._reducer is not None
        return self._reducer.no_sync()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As Lightning's, with gradients final between the backward pass and ``post_backward``."""
        module, plugin = self.lightning_module, self.precision_plugin
        assert module is not None
        assert self._reducer is not None
        self.pre_backward(closure_loss)
        closure_loss = plugin.pre_backward(closure_loss, module)
        with self._reducer.backward_pass():
            plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        closure_loss = plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss
