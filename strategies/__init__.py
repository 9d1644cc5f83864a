"""Who agrees with whom, and when: Lightning strategies, registered by name when this package is imported."""

from lightning.fabric.strategies import STRATEGY_REGISTRY as FABRIC_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from .collective import CollectiveStrategy
from .fabric_manual_allreduce import FabricManualAllReduceStrategy
from .manual_allreduce import ManualAllReduceStrategy
from .parameter_server import ParameterServerStrategy
from .sharded_server import ShardedServerStrategy

STRATEGIES: dict[str, type[CollectiveStrategy]] = {
    cls.strategy_name: cls for cls in (ManualAllReduceStrategy, ParameterServerStrategy, ShardedServerStrategy)
}

for _name, _cls in STRATEGIES.items():
    StrategyRegistry.register(_name, _cls, description=(_cls.__doc__ or "").splitlines()[0], override=True)

FABRIC_REGISTRY.register(
    FabricManualAllReduceStrategy.strategy_name,
    FabricManualAllReduceStrategy,
    description=(FabricManualAllReduceStrategy.__doc__ or "").splitlines()[0],
    override=True,
)

__all__ = [
    "STRATEGIES",
    "CollectiveStrategy",
    "FabricManualAllReduceStrategy",
    "ManualAllReduceStrategy",
    "ParameterServerStrategy",
    "ShardedServerStrategy",
]
