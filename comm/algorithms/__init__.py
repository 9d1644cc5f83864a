"""Ways to average gradients over ranks, by name."""

from .algorithm import Algorithm, AlgorithmUnavailable, BackgroundAlgorithm, BlockingAlgorithm
from .backend import NaiveAllReduce, NativeAllReduce
from .choice import ALGORITHMS, make_algorithm, name_of
from .halving_doubling import HalvingDoublingAllReduce
from .hierarchical import HierarchicalAllReduce
from .ring import RingAllReduce
from .shared_memory import SharedMemoryAllReduce

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmUnavailable",
    "BackgroundAlgorithm",
    "BlockingAlgorithm",
    "HalvingDoublingAllReduce",
    "HierarchicalAllReduce",
    "NaiveAllReduce",
    "NativeAllReduce",
    "RingAllReduce",
    "SharedMemoryAllReduce",
    "make_algorithm",
    "name_of",
]
