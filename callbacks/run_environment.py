"""What a run ran on and with: for result files, benchmarks and the start banner."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

_ROOT = Path(__file__).resolve().parent.parent


def machine_environment() -> dict[str, Any]:
    """Versions and host, the same for every run of this process. Starts git once, for the commit."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "gradsync": gradsync_version(),
        "platform": platform.platform(),
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "omp_num_threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def run_environment(trainer: pl.Trainer) -> dict[str, Any]:
    """:func:`machine_environment` and what this run chose. Call it in or after ``on_fit_start``."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        **machine_environment(),
        "backend": process_group_backend(),
        "accelerator": trainer.strategy.root_device.type,
        "strategy_options": strategy_options(trainer.strategy),
        "seed": int(seed) if seed else None,
        "load_average": list(os.getloadavg()),
    }


def strategy_flag(strategy: object) -> str:
    """What selects `strategy` on the command line; its class name where nothing shorter does."""
    return strategy_class_flag(type(strategy))


def strategy_class_flag(cls: type) -> str:
    """The same of a class. One of somebody else's that only inherits a name has none: it is not its parent."""
    if cls is DDPStrategy:
        return "ddp"
    inherits = "strategy_name" not in vars(cls) and not cls.__module__.startswith("lightning.")
    name = None if inherits else getattr(cls, "strategy_name", None)
    return name if isinstance(name, str) else cls.__name__


def strategy_options(strategy: object) -> dict[str, Any]:
    """The strategy's own options as JSON holds them: its attribute ``options``, or the arguments DDP was given.

    And those of the backend, by their own names.
    """
    options = getattr(strategy, "options", None) or getattr(strategy, "_ddp_kwargs", None) or {}
    options = {**options, **getattr(strategy, "backend_options", {})}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in options.items()}


def num_servers(strategy: object) -> int:
    """Processes that serve and do not train; they are no part of Lightning's world."""
    return int(getattr(strategy, "num_servers", 0) or 0)


def process_group_backend() -> str | None:
    """``gloo`` or ``nccl``; None where there is no process group."""
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


def gradsync_version() -> str:
    try:
        return version("gradsync")
    except PackageNotFoundError:  # imported from a checkout that nobody installed
        return "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed wheel, also inside another checkout."""
    command = ["git", "-C", str(_ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if Path(top) == _ROOT else None
