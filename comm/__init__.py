"""What travels between ranks and how: buckets, algorithms, the reducer, the parameter server. No Lightning here."""

from .allreduce import ALGORITHMS, Algorithm, NaiveAllReduce, NativeAllReduce
from .buckets import Bucket, build_buckets
from .reducer import GradientReducer
from .timeline import StepCommunication, Timeline

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Bucket",
    "GradientReducer",
    "NaiveAllReduce",
    "NativeAllReduce",
    "StepCommunication",
    "Timeline",
    "build_buckets",
]
