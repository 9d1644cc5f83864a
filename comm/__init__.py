"""What travels between ranks and how: algorithms, hooks, the reducer, the parameter server. No Lightning here."""

from .agreement import ModelMismatch
from .algorithms import (
    ALGORITHMS,
    Algorithm,
    AlgorithmUnavailable,
    NaiveAllReduce,
    NativeAllReduce,
    SharedMemoryAllReduce,
    make_algorithm,
)
from .buckets import Bucket
from .engine import make_reducer, reducer_for
from .hooks import BadHook, as_ddp_hook
from .reducer import GradientReducer
from .shared_memory import PeerLost, SharedMemoryError
from .timeline import StepCommunication, Timeline

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmUnavailable",
    "BadHook",
    "Bucket",
    "GradientReducer",
    "ModelMismatch",
    "NaiveAllReduce",
    "NativeAllReduce",
    "PeerLost",
    "SharedMemoryAllReduce",
    "SharedMemoryError",
    "StepCommunication",
    "Timeline",
    "as_ddp_hook",
    "make_algorithm",
    "make_reducer",
    "reducer_for",
]
