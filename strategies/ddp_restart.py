"""torchrun's restarts under Lightning's own DDP, which would wait for the sockets of the attempt before."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy

from .rendezvous import connect_store, start_default_group


def form_group_after_restart(strategy: Any) -> None:
    """Form the default group in this attempt's own part of torchrun's store; Lightning then takes it as it is.

    Lightning lets torch use the store under the same keys in every attempt, and gloo hangs. Called on all ranks of a
    run, blocks until they are there; does nothing in a first attempt, outside of torchrun, and under other strategies.

    Raises:
        UserError: the ranks do not meet in time.
    """
    if not isinstance(strategy, DDPStrategy) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    environment = strategy.cluster_environment
    assert environment is not None
    rank, limit = environment.global_rank(), strategy._timeout or default_pg_timeout
    shared, _ = connect_store(environment.main_address, environment.main_port, rank, limit)
    backend, size = strategy._get_process_group_backend(), environment.world_size()
    start_default_group(shared, backend, rank, size, limit, strategy.root_device)
