"""The parameter server: wire protocol, server, worker's client, remote optimizer."""

from .async_server import AsyncServer
from .client import ServerFailed, WorkerClient
from .protocol import ProtocolError
from .remote_optimizer import RemoteOptimizer
from .server import ParameterServer, WorkerFailed
from .servers_client import ServersClient
from .statistics import Interval, ServerStatistics, WorkerFigures
from .sync_server import SyncServer
from .worker_growth import WorkerGrowth

__all__ = [
    "AsyncServer",
    "Interval",
    "ParameterServer",
    "ProtocolError",
    "RemoteOptimizer",
    "ServerFailed",
    "ServerStatistics",
    "ServersClient",
    "SyncServer",
    "WorkerClient",
    "WorkerFailed",
    "WorkerFigures",
    "WorkerGrowth",
]
