"""How checkpoints get to the disk and back."""

from .durable_io import DurableCheckpointIO, is_local
from .in_background import BackgroundCheckpointIO

__all__ = ["BackgroundCheckpointIO", "DurableCheckpointIO", "is_local"]
