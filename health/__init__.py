"""What ``gradsync doctor`` looks at: the machine, its network, its disks, its GPUs, and ranks that really start."""

from .check import Check, Mark
from .planned_run import PlannedRun

__all__ = ["Check", "Mark", "PlannedRun"]
