"""What a worker's training loop takes for its optimizer; the real one lives on the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from .client import WorkerClient
from .servers_client import ServersClient

_NO_CLIPPING = {"algorithm": None, "value": 0.0}


@final
class RemoteOptimizer(Optimizer):
    """``step()`` pushes the gradients and returns with the new parameters in place.

    It shares the parameter groups with ``inner``, so learning-rate schedulers made for ``inner`` work, and what
    they set travels with every push. It holds no state: ask the server for it.

    Args:
        inner: The optimizer as configured; never stepped here.
        client: The connection, already started.
        number: Index among the module's optimizers.
    """

    def __init__(self, inner: Optimizer, client: WorkerClient | ServersClient, number: int) -> None:
        super().__init__(inner.param_groups, dict(inner.defaults))
        self._inner = inner
        self._client = client
        self._number = number
        self._ready = True
        self._clip: dict[str, Any] = _NO_CLIPPING

    def clip_on_server(self, algorithm: str, value: float) -> None:
        """Clip the averaged gradient of the coming step by ``"norm"`` or ``"value"``."""
        self._clip = {"algorithm": algorithm, "value": float(value)}

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._client.step(self._number, self._settings(), self._clip)
        self._clip = _NO_CLIPPING
        # Schedulers watch the optimizer they were made for and warn if it was never stepped.
        self._inner._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def _settings(self) -> list[dict[str, Any]]:
        """The parameter groups' scalars, JSON-compatible."""
        return [
            {key: _scalar(value) for key, value in group.items() if key not in ("params", "param_names")}
            for group in self.param_groups
        ]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer on the server. Blocks; only one worker needs to ask."""
        state = self._client.get_state(self._number)
        # The server knows the settings of the last push; a scheduler may have changed them since.
        first = 0
        for saved, group in zip(state["param_groups"], self.param_groups, strict=True):
            saved.update(group)
            saved["params"] = list(range(first, first + len(group["params"])))
            first += len(group["params"])
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the server's optimizer and this worker's parameter-group settings.

        Raises:
            ValueError: it belongs to parameter groups of other sizes.
        """
        sizes = [
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the optimizer state is for parameter groups of {sizes[0]} tensors, not {sizes[1]}")
        self._client.set_state(self._number, state_dict)
        self.load_settings(state_dict)

    def load_settings(self, state_dict: dict[str, Any]) -> None:
        """Restore the parameter-group settings only: in place, since ``inner`` and its schedulers share them."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_ready", False):
            raise ValueError(
                "the parameter server cannot take a new parameter group in mid-run (BackboneFinetuning adds one): "
                "pass all parameters to the optimizer from the start, or use --trainer.strategy manual_allreduce"
            )
        super().add_param_group(param_group)


def _scalar(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
