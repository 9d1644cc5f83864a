"""Memory that the ranks of one host share, and how they wait for each other in it. Linux only."""

from .host_group import HostGroup, PeerLost
from .segment import Segment, SharedMemoryError

__all__ = ["HostGroup", "PeerLost", "Segment", "SharedMemoryError"]
