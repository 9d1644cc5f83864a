"""What a fit asks for and the parameter server cannot do: said by name before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ..comm.server.layout import travelling_dtype
from ..errors import UserError
from .averaging import refuse_averaging
from .server_options import LOOPBACK, ServerOptions

_FLAG = "--trainer.strategy"


def refuse_hosts(options: ServerOptions, num_nodes: int) -> None:
    """Raise UserError for what no other host can reach, where there are others."""
    if num_nodes == 1:
        return
    flag = f"--trainer.num_nodes {num_nodes} with {_FLAG} parameter_server"
    if options.transport != "tcp":
        raise UserError(f"{flag} needs {_FLAG}.transport tcp: {options.transport} ends at the host's edge")
    if options.host == LOOPBACK:
        raise UserError(
            f"{flag} needs {_FLAG}.host ADDRESS, by which the other hosts reach the first one (the server's), and "
            f"{_FLAG}.keys DIR of `gradsync keygen DIR`, the same on all hosts"
        )


def refuse_settings(options: ServerOptions, trainer: pl.Trainer, precision_plugin: Any) -> None:
    """Raise UserError for a loss scaler, and for averaged weights where they would be lost."""
    if getattr(precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"--trainer.precision 16-mixed does not work with {_FLAG} parameter_server: a loss scaler may skip a step "
            "on one worker only; use bf16-mixed"
        )
    if not options.is_sync:  # fetching parameters would overwrite the average
        refuse_averaging(trainer, f"{_FLAG}.mode {options.mode}", f"use {_FLAG}.mode sync")
    if options.share_parameters:  # all workers would swap the same memory
        refuse_averaging(trainer, f"{_FLAG}.share_parameters", "leave it out")
    if options.wire_dtype is not None:
        refuse_averaging(trainer, f"{_FLAG}.wire_dtype {options.wire_dtype}", "leave it out")


def refuse_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Raise UserError for LBFGS."""
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise UserError(
            "LBFGS evaluates the model again within a step, which the parameter server cannot: "
            f"use {_FLAG} manual_allreduce or another optimizer"
        )


def warn_of_no_effect(options: ServerOptions, travelling: Iterable[Tensor]) -> None:
    """Of ``wire_dtype``, where none of the ``travelling`` parameters is of a wider float dtype."""
    wire_dtype = options.dtype_on_wire
    if wire_dtype is not None and all(travelling_dtype(p.dtype, wire_dtype) == p.dtype for p in travelling):
        rank_zero_warn(
            f"{_FLAG}.wire_dtype {options.wire_dtype} has no effect: no trained parameter is of a wider float dtype"
        )
