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
from .worker_growth import WorkerGrowth

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
        growth: Tells the servers what joins in mid-run; without it nothing may.
    """

    def __init__(
        self,
        inner: Optimizer,
        client: WorkerClient | ServersClient,
        number: int,
        growth: WorkerGrowth | None = None,
    ) -> None:
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.param_groups = inner.param_groups  # the list too: groups are added through either
        self._inner = inner
        self._growth = growth
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
        self._follow_groups()
        self._client.step(self._number, self._settings(), self._clip)
        self._clip = _NO_CLIPPING
        # Schedulers watch the optimizer they were made for and warn if it was never stepped.
        self._inner._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def _follow_groups(self) -> None:
        """Let the server know of parameters and groups that have joined since the last step."""
        self._inner.param_groups = self.param_groups  # BaseFinetuning replaces the list when a run resumes
        if self._growth is not None:
            self._growth.follow(self._number, self.param_groups, self._settings())

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
        # The server knows the settings and the groups of the last push; both may have changed since.
        first = 0
        missing: list[dict[str, Any]] = [{} for _ in self.param_groups[len(state["param_groups"]) :]]
        state["param_groups"] += missing
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
        self._follow_groups()
        self._client.set_state(self._number, state_dict)
        self.load_settings(state_dict)

    def load_settings(self, state_dict: dict[str, Any]) -> None:
        """Restore the parameter-group settings only: in place, since ``inner`` and its schedulers share them."""
        self._follow_groups()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes effect on the server with the next step; all workers must do it before the same one."""
        if not getattr(self, "_ready", False):
            super().add_param_group(param_group)
        elif self._growth is None:
            raise ValueError("this parameter server cannot take a new parameter group in mid-run: pass `growth`")
        else:
            self._inner.add_param_group(param_group)


def _scalar(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
