"""The options of the parameter server: checked before any process starts."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from ..comm.server.wire import WIRE_DTYPES
from ..errors import UserError

_TRANSPORTS = ("auto", "shared_memory", "ipc", "tcp", "collective", "naive")
_OF_ALL_WORKERS = ("collective", "naive")
"""Transports in which all processes take part in every step."""
_MODES = ("sync", "async", "bounded")
_ON_WORKER_LOSS = ("stop", "continue")
_FLAG = "--trainer.strategy."
_DEFAULT_STALENESS = 4
LOOPBACK = "127.0.0.1"


@final
@dataclass(frozen=True)
class ServerOptions:
    """See :class:`.ParameterServerStrategy`.

    Raises:
        UserError: an option has a value that no run can use, or that the others contradict.
    """

    transport: str = "auto"
    part_mib: float | None = None
    servers: int = 1
    share_parameters: bool = False
    mode: str = "sync"
    staleness: int | None = None
    staleness_correction: bool = False
    record_schedule: Path | None = None
    replay_schedule: Path | None = None
    wire_dtype: str | None = None
    host: str = LOOPBACK
    keys: Path | None = None
    on_worker_loss: str = "stop"
    max_replacements: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        self._check_transport()
        self._check_mode()
        self._check_security()
        if self.share_parameters:
            self._check_sharing()
        self._check_replacements()
        if self.goes_on:
            self._check_going_on()

    def _check_values(self) -> None:
        names = (
            *(("transport", _TRANSPORTS), ("mode", _MODES), ("wire_dtype", (None, *WIRE_DTYPES))),
            ("on_worker_loss", _ON_WORKER_LOSS),
        )
        for name, known in names:
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{_FLAG}{name} must be one of {', '.join(filter(None, known))}, got {value!r}")
        if self.part_mib is not None and self.part_mib <= 0:
            raise UserError(f"{_FLAG}part_mib must be > 0 MiB, got {self.part_mib}")
        if self.servers < 1:
            raise UserError(f"{_FLAG}servers must be >= 1, got {self.servers}")
        if self.staleness is not None and self.staleness < 0:
            raise UserError(f"{_FLAG}staleness must be >= 0 steps (0: sync), got {self.staleness}")

    def _check_transport(self) -> None:
        if self.transport not in _OF_ALL_WORKERS:
            return
        chosen = f"{_FLAG}transport {self.transport}"
        if self.wire_dtype:
            raise UserError(
                f"{_FLAG}wire_dtype needs {_FLAG}transport shared_memory, ipc or tcp: {self.transport} sends "
                "tensors as they are"
            )
        if self.servers > 1:
            raise UserError(f"{chosen} knows one server only, got {_FLAG}servers {self.servers}")
        if not self.is_sync:
            raise UserError(f"{chosen} knows the mode sync only")

    def _check_mode(self) -> None:
        if self.staleness is not None and self.mode != "bounded":
            raise UserError(f"{_FLAG}staleness is the bound of {_FLAG}mode bounded, but the mode is {self.mode}")
        if self.is_sync:
            for name in ("staleness_correction", "record_schedule", "replay_schedule"):
                if getattr(self, name):
                    raise UserError(f"{_FLAG}{name} needs {_FLAG}mode async or bounded")
        elif self.servers > 1 and (self.record_schedule or self.replay_schedule):
            raise UserError(f"{_FLAG}record_schedule and replay_schedule need {_FLAG}servers 1")

    def _check_security(self) -> None:
        if self.host != LOOPBACK and self.transport != "tcp":
            raise UserError(f"{_FLAG}host {self.host} needs {_FLAG}transport tcp, got {self.transport}")
        if self.keys is not None and self.transport != "tcp":
            raise UserError(f"{_FLAG}keys are for {_FLAG}transport tcp, got {self.transport}: leave one of them out")
        address = _address(self.host)
        if not address.is_loopback and self.keys is None:
            raise UserError(
                f"{_FLAG}host {self.host} lets other machines connect, and without keys whoever does takes part: make "
                f"some with `gradsync keygen DIR`, and give {_FLAG}keys DIR"
            )

    def _check_sharing(self) -> None:
        flag = f"{_FLAG}share_parameters"
        if self.transport not in ("auto", "shared_memory"):
            raise UserError(f"{flag} needs {_FLAG}transport shared_memory, got {self.transport}")
        if not self.is_sync:
            raise UserError(f"{flag} needs {_FLAG}mode sync, got {self.mode}: others would step parameters in use")
        if self.wire_dtype is not None:
            raise UserError(f"{flag} needs parameters as they are: leave out {_FLAG}wire_dtype {self.wire_dtype}")

    def _check_replacements(self) -> None:
        if self.max_replacements < 0:
            raise UserError(f"{_FLAG}max_replacements must be >= 0 processes, got {self.max_replacements}")
        if self.max_replacements and not self.goes_on:
            raise UserError(f"{_FLAG}max_replacements needs {_FLAG}on_worker_loss continue")
        if self.max_replacements and not self.is_sync:  # it would change parameters that the others evaluate
            raise UserError(f"{_FLAG}max_replacements needs {_FLAG}mode sync so far, got {self.mode}")

    def _check_going_on(self) -> None:
        chosen = f"{_FLAG}on_worker_loss continue"
        if self.transport in _OF_ALL_WORKERS:
            raise UserError(
                f"{chosen} needs {_FLAG}transport shared_memory, ipc or tcp: with {self.transport} every worker takes "
                "part in every step"
            )
        if self.share_parameters:
            raise UserError(f"{chosen} needs workers with parameters of their own: leave out {_FLAG}share_parameters")
        if self.replay_schedule is not None:
            raise UserError(f"{chosen} cannot keep to an order of workers: leave out {_FLAG}replay_schedule")

    @property
    def goes_on(self) -> bool:
        """Whether a run survives the loss of a worker."""
        return self.on_worker_loss == "continue"

    @property
    def is_sync(self) -> bool:
        """Whether all workers take part in every step."""
        return self.mode == "sync" or (self.mode == "bounded" and self.staleness == 0)

    @property
    def dtype_on_wire(self) -> torch.dtype | None:
        """None: as tensors are held."""
        return WIRE_DTYPES[self.wire_dtype] if self.wire_dtype else None

    @property
    def bound(self) -> int | None:
        """How many steps a worker may be ahead of the slowest; None for any number."""
        if self.mode != "bounded":
            return None
        return _DEFAULT_STALENESS if self.staleness is None else self.staleness

    def shown(self) -> dict[str, Any]:
        """For banners and result files."""
        options: dict[str, Any] = {"transport": self.transport, "part_mib": self.part_mib}
        options |= {"servers": self.servers, "mode": self.mode, "share_parameters": self.share_parameters}
        if self.wire_dtype is not None:
            options["wire_dtype"] = self.wire_dtype
        if self.host != LOOPBACK:
            options["host"] = self.host
        if self.keys is not None:
            options["keys"] = str(self.keys)
        if self.goes_on:
            options |= {"on_worker_loss": self.on_worker_loss, "max_replacements": self.max_replacements}
        if not self.is_sync:
            options |= {"staleness": self.bound, "staleness_correction": self.staleness_correction}
        return options

    def write_schedule(self, workers: list[int]) -> None:
        """Write what was applied, if that is wanted."""
        if self.record_schedule is not None:
            part = self.record_schedule.with_name(f"{self.record_schedule.name}.part")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(workers))
            part.replace(self.record_schedule)

    def schedule(self) -> list[int]:
        """The order of workers to apply pushes in; empty for the order of arrival.

        Raises:
            UserError: the file cannot be read.
        """
        if self.replay_schedule is None:
            return []
        try:
            return [int(worker) for worker in json.loads(self.replay_schedule.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{_FLAG}replay_schedule: {self.replay_schedule} is no recorded schedule: {error}"
            ) from error


def default_part_mib(transport: str, shares_memory: bool) -> float:
    """What was fastest, in MiB; ``shares_memory``: what transport ``auto`` comes to."""
    if transport == "collective":
        return 25.0
    return 16.0 if shares_memory else 4.0


def _address(host: str) -> ipaddress.IPv4Address:
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError as error:
        raise UserError(f"{_FLAG}host must be an IPv4 address of this machine, got {host!r}") from error
    if address.is_unspecified or address.is_multicast:
        raise UserError(f"{_FLAG}host must be one address, which the workers connect to, got {host!r}")
    return address
