"""gradsync: choose how your gradients travel, by a flag, and see what that costs.

Importing the package registers its strategies, so ``Trainer(strategy="manual_allreduce")`` works.
"""

from .checkpoints import DurableCheckpointIO
from .errors import UserError
from .strategies import STRATEGIES, ManualAllReduceStrategy, ParameterServerStrategy, ShardedServerStrategy

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES",
    "DurableCheckpointIO",
    "ManualAllReduceStrategy",
    "ParameterServerStrategy",
    "ShardedServerStrategy",
    "UserError",
    "__version__",
]
