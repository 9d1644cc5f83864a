"""The options of the gradient reducer, as a front end without flags takes them: checked before any rank starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from ..comm.agreement import ModelMismatch, check_same_model
from ..comm.algorithms import ALGORITHMS, AlgorithmUnavailable
from ..comm.algorithms.choice import AUTO
from ..comm.broadcast import broadcast_tensors
from ..comm.engine import make_reducer
from ..comm.hooks import BadHook
from ..comm.reducer import GradientReducer
from ..comm.shared_memory import SharedMemoryError
from ..errors import UserError


@final
@dataclass(frozen=True)
class ReducerOptions:
    """See :func:`.make_reducer`.

    Raises:
        UserError: an option has a value that no run can use.
    """

    algorithm: str
    bucket_mib: float | str
    overlap: bool
    comm_hook: str | Callable[..., Any] | None
    comm_state: Any
    step_timeout_s: float

    def __post_init__(self) -> None:
        if self.algorithm not in (AUTO, *ALGORITHMS):
            raise UserError(f"algorithm must be one of {', '.join([AUTO, *ALGORITHMS])}, got {self.algorithm!r}")
        is_size = isinstance(self.bucket_mib, (int, float)) and 0 < self.bucket_mib < float("inf")
        if not is_size and self.bucket_mib != AUTO:
            raise UserError(f"bucket_mib must be > 0 MiB or {AUTO!r}, got {self.bucket_mib!r}")
        check_seconds("step_timeout_s", self.step_timeout_s)

    @property
    def state_is_an_object(self) -> bool:
        """Whether ``comm_state`` is a hook's state itself, which only one model can use, not what to make it from."""
        return self.comm_state is not None and not isinstance(self.comm_state, Mapping)

    def reducer_for(self, module: nn.Module, taken: Collection[Tensor], log: Callable[[str], None]) -> GradientReducer:
        """As :func:`.comm.engine.reducer_for`, without the parameters in ``taken``; blocks until all ranks are here.

        Raises:
            UserError: the ranks hold different models, or what was asked for cannot run here.
        """
        state = [*module.named_parameters(), *module.named_buffers()]
        try:
            check_same_model(state)
            broadcast_tensors(tensor for _, tensor in state)
            return make_reducer(
                [(name, parameter) for name, parameter in module.named_parameters() if parameter not in taken],
                algorithm=self.algorithm,
                comm_hook=self.comm_hook,
                comm_state=self.comm_state,
                bucket_mib=self.bucket_mib,
                overlap=self.overlap,
                timeout_s=self.step_timeout_s,
                log=log,
            )
        except (AlgorithmUnavailable, BadHook, ModelMismatch, SharedMemoryError) as error:
            raise UserError(f"strategy manual_allreduce: {error}") from error


def check_seconds(name: str, value: float) -> None:
    """Raises :class:`.UserError` unless ``value`` is a duration."""
    if value <= 0:
        raise UserError(f"{name} must be > 0 seconds, got {value}")
