"""PyTorch DDP communication hooks: any of them on our engine, our algorithms on DDP, and compression torch lacks."""

from .bridge import BadHook, Hook, HookAlgorithm, HookBucket, as_ddp_hook
from .int8 import Int8State, int8_hook
from .names import HOOKS, make_hook
from .top_k import TopKState, top_k_hook

__all__ = [
    "HOOKS",
    "BadHook",
    "Hook",
    "HookAlgorithm",
    "HookBucket",
    "Int8State",
    "TopKState",
    "as_ddp_hook",
    "int8_hook",
    "make_hook",
    "top_k_hook",
]
