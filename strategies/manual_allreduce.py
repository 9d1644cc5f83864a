"""``--trainer.strategy manual_allreduce``: our own reducer averages gradients during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..comm.agreement import gather_trees
from ..comm.algorithms import name_of
from ..comm.engine import DEFAULT_BUCKET_MIB
from ..comm.hooks import HookAlgorithm
from ..comm.reducer import GradientReducer
from .collective import CollectiveStrategy
from .reducer_options import ReducerOptions

CHECKPOINT_KEY = "gradsync_communication"
"""Where a checkpoint holds the state of communication."""


@final
class ManualAllReduceStrategy(CollectiveStrategy):
    """Every rank trains a replica; buckets of gradients are averaged with an all-reduce of your choice.

    At 2 ranks the result equals Lightning's DDP to the bit, unless a hook compresses.

    Args:
        algorithm: ``auto`` (``shared_memory`` where all ranks are on one host and gradients on the CPU, else
            ``native``), ``native`` (the backend's all-reduce per bucket), ``ring``, ``halving_doubling``,
            ``hierarchical``, ``shared_memory`` or ``naive`` (a blocking one per parameter).
        bucket_mib: A bucket is full when it reaches so many MiB; ``auto`` tries sizes in the first steps.
        overlap: Reduce during the backward pass (true) or after it (false).
        comm_hook: A DDP communication hook in place of the algorithm: ``bf16``, ``fp16``, ``powersgd``, ``int8``,
            ``top_k``, a dotted path, ``wrapper(hook)`` of those, or a callable.
        comm_state: The hook's options (``{"share": 0.01}``), ``{"class_path": ..., "init_args": ...}`` of its state,
            or, from Python, the state itself, whatever its class.
        kwargs: See :class:`CollectiveStrategy`.
    """

    strategy_name = "manual_allreduce"
    averages_gradients = True

    def __init__(
        self,
        algorithm: str = "auto",
        bucket_mib: float | str = DEFAULT_BUCKET_MIB,
        overlap: bool = True,
        comm_hook: str | Callable[..., Any] | None = None,
        comm_state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._reducer_options = ReducerOptions(
            algorithm,
            bucket_mib,
            overlap,
            comm_hook,
            comm_state,
            self.step_timeout.total_seconds(),
            flag="--trainer.strategy.",
        )
        self.options = self._reducer_options.shown()
        self._reducer: GradientReducer | None = None
        self._restored: dict[str, Any] | None = None

    @override
    def start_fitting(self) -> None:
        assert self.model is not None
        parameters = self.model.named_parameters()
        reducer = self._reducer = self._reducer_options.make_reducer(parameters, rank_zero_info, self.timeline)
        if "comm_hook" not in self.options:
            self.options["algorithm"] = name_of(reducer.algorithm)
        self._restore(reducer)

    @override
    def stop_fitting(self) -> None:
        assert self._reducer is not None
        self._reducer.close()
        self._reducer = None

    @override
    def accumulate_locally(self) -> Any:
        assert self._reducer is not None
        return self._reducer.no_sync()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._reducer is not None
        return self.backward_within(self._reducer.backward_pass(), closure_loss, optimizer, *args, **kwargs)

    # -- checkpoints -----------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """With the state of communication in it; Lightning calls this on all ranks."""
        if self._reducer is not None:
            state = self._reducer.state_dict()
            if isinstance(self._reducer.algorithm, HookAlgorithm):  # what it still has to send differs between ranks
                state["algorithm"] = gather_trees(state["algorithm"])
            checkpoint[CHECKPOINT_KEY] = {**state, "world_size": self.world_size}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.get(CHECKPOINT_KEY)
        return checkpoint

    def _restore(self, reducer: GradientReducer) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        had_hook, has_hook = isinstance(state["algorithm"], list), isinstance(reducer.algorithm, HookAlgorithm)
        if had_hook != has_hook or (had_hook and state["world_size"] != self.world_size):
            rank_zero_warn(
                f"the checkpoint is of {state['world_size']} ranks {'with' if had_hook else 'without'} a communication "
                f"hook, this run has {self.world_size} {'with' if has_hook else 'without'} one: what compression had "
                "still to send starts anew"
            )
            return
        if had_hook:
            state = {**state, "algorithm": state["algorithm"][self.global_rank]}
        try:
            reducer.load_state_dict(state)
        except ValueError as error:
            rank_zero_warn(f"the checkpoint's state of communication starts anew: {error}")
