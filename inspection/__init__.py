"""What a model consists of, without training it: where it comes from, its tensors, how strategies would cut it."""

from .bucket_plan import StrategyPlan, plan_strategy
from .checkpoint_file import list_file
from .entries import Entry, Listing, module_entries
from .sources import find_model

__all__ = ["Entry", "Listing", "StrategyPlan", "find_model", "list_file", "module_entries", "plan_strategy"]
