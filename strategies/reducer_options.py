"""The options of the gradient reducer, the same for every front end: checked before any rank starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..comm.algorithms import ALGORITHMS, AlgorithmUnavailable
from ..comm.algorithms.choice import AUTO
from ..comm.engine import check_bucket_mib, make_reducer
from ..comm.hooks import BadHook
from ..comm.reducer import GradientReducer
from ..comm.shared_memory import SharedMemoryError
from ..comm.timeline import Timeline
from ..errors import UserError


@final
@dataclass(frozen=True)
class ReducerOptions:
    """See :func:`.make_reducer`. ``flag`` is what users write before an option's name.

    Raises:
        UserError: an option has a value that no run can use.
    """

    algorithm: str
    bucket_mib: float | str
    overlap: bool
    comm_hook: str | Callable[..., Any] | None
    comm_state: Any
    step_timeout_s: float
    flag: str = ""

    def __post_init__(self) -> None:
        if self.algorithm not in (AUTO, *ALGORITHMS):
            names = ", ".join([AUTO, *ALGORITHMS])
            raise UserError(f"{self.flag}algorithm must be one of {names}, got {self.algorithm!r}")
        try:
            check_bucket_mib(self.bucket_mib)
        except ValueError as error:
            raise UserError(f"{self.flag}{error}") from error
        check_seconds(f"{self.flag}step_timeout_s", self.step_timeout_s)

    @property
    def state_is_an_object(self) -> bool:
        """Whether ``comm_state`` is a hook's state itself, which only one model can use, not what to make it from."""
        return self.comm_state is not None and not isinstance(self.comm_state, Mapping)

    def shown(self) -> dict[str, Any]:
        """For banners and result files."""
        hook = self.comm_hook
        if hook is not None and not isinstance(hook, str):
            hook = f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', hook)}"
        options = {"algorithm": self.algorithm, "bucket_mib": self.bucket_mib, "overlap": self.overlap}
        return {**options, **({"comm_hook": hook} if hook is not None else {})}

    def make_reducer(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        log: Callable[[str], None],
        timeline: Timeline | None = None,
    ) -> GradientReducer:
        """Blocks until all ranks are here.

        Raises:
            UserError: what was asked for cannot run here.
        """
        try:
            return make_reducer(
                named_parameters,
                algorithm=self.algorithm,
                comm_hook=self.comm_hook,
                comm_state=self.comm_state,
                bucket_mib=self.bucket_mib,
                overlap=self.overlap,
                timeout_s=self.step_timeout_s,
                timeline=timeline,
                log=log,
            )
        except (AlgorithmUnavailable, BadHook, SharedMemoryError) as error:
            raise UserError(f"strategy manual_allreduce: {error}") from error


def check_seconds(name: str, value: float) -> None:
    """Raises :class:`.UserError` unless ``value`` is a duration."""
    if value <= 0:
        raise UserError(f"{name} must be > 0 seconds, got {value}")
