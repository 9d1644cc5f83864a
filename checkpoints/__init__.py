"""How checkpoints get to the disk and back."""

from .durable_io import DurableCheckpointIO
from .in_background import BackgroundCheckpointIO

__all__ = ["BackgroundCheckpointIO", "DurableCheckpointIO"]
