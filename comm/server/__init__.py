"""The parameter server: wire protocol, server, worker's client, remote optimizer."""

from .client import ServerFailed, WorkerClient
from .protocol import ProtocolError
from .remote_optimizer import RemoteOptimizer
from .server import ParameterServer, ServerStatistics, WorkerFailed

__all__ = [
    "ParameterServer",
    "ProtocolError",
    "RemoteOptimizer",
    "ServerFailed",
    "ServerStatistics",
    "WorkerClient",
    "WorkerFailed",
]
