"""Every rank serves a shard: reduce-scatter of gradients, a step of the own slices, all-gather of parameters."""

from .layout import Unshardable
from .optimizer import ShardedOptimizer
from .server import TRANSPORTS, ShardedServer, make_sharded_server

__all__ = ["TRANSPORTS", "ShardedOptimizer", "ShardedServer", "Unshardable", "make_sharded_server"]
