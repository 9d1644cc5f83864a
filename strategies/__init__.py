"""Who agrees with whom, and when: Lightning strategies, registered by name when this package is imported."""

from lightning.pytorch.strategies import StrategyRegistry

from .collective import CollectiveStrategy
from .manual_allreduce import ManualAllReduceStrategy
from .parameter_server import ParameterServerStrategy

STRATEGIES: dict[str, type[CollectiveStrategy]] = {
    cls.strategy_name: cls for cls in (ManualAllReduceStrategy, ParameterServerStrategy)
}

for _name, _cls in STRATEGIES.items():
    StrategyRegistry.register(_name, _cls, description=(_cls.__doc__ or "").splitlines()[0], override=True)

__all__ = ["STRATEGIES", "CollectiveStrategy", "ManualAllReduceStrategy", "ParameterServerStrategy"]
