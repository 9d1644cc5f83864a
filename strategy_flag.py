"""``--trainer.strategy NAME`` with options: names become class paths before jsonargparse sees them."""

from __future__ import annotations

import importlib

from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from .callbacks.run_environment import strategy_class_flag
from .errors import UserError
from .strategies import STRATEGIES

_FLAG = "--trainer.strategy"
_BUILT_IN = {"auto", "single_device"}


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _known_classes(cls: type = Strategy) -> set[str]:
    return {cls.__name__}.union(*(_known_classes(sub) for sub in cls.__subclasses__()))


def check_name(name: str) -> None:
    """Raise UserError with both lists of names for one that nobody knows; class paths are left to the parser."""
    lightning_names = set(StrategyRegistry.available_strategies()) - STRATEGIES.keys()
    if "." in name or name in lightning_names | STRATEGIES.keys() | _BUILT_IN or name in _known_classes():
        return
    raise UserError(
        f"unknown {_FLAG} {name!r}: gradsync has {', '.join(STRATEGIES)}; "
        f"Lightning has {', '.join(sorted(lightning_names))}"
    )


def strategy_name(given: str) -> str:
    """What a strategy given by name or class path is called in results.

    Raises:
        UserError: the class path leads nowhere.
    """
    cls = strategy_class(given)
    return given if cls is None else strategy_class_flag(cls)


def strategy_class(given: str) -> type | None:
    """The class that a class path leads to; None for a name.

    Raises:
        UserError: the class path leads nowhere.
    """
    if "." not in given:
        return None
    module, _, name = given.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{_FLAG} {given!r} cannot be imported: {error}") from error


def expand(arguments: list[str]) -> list[str]:
    """Replace a registered name by its class path and put it before the strategy's options.

    Idempotent, since child processes run the same arguments again. Lightning's own names stay as they are,
    except ``ddp`` with options (https://github.com/Lightning-AI/pytorch-lightning/issues/19682).

    Raises:
        UserError: for an unknown name.
    """
    flat = [part for argument in arguments for part in _split(argument)]
    if _FLAG not in flat[:-1]:
        return arguments
    at = flat.index(_FLAG)
    name = flat[at + 1]
    check_name(name)
    has_options = any(argument.startswith(f"{_FLAG}.") for argument in flat)
    classes: dict[str, type] = {**STRATEGIES, **({"ddp": DDPStrategy} if has_options else {})}
    rest = flat[:at] + flat[at + 2 :]
    first_option = next((i for i, argument in enumerate(rest) if argument.startswith(f"{_FLAG}.")), at)
    position = min(at, first_option)
    return [*rest[:position], _FLAG, class_path(classes[name]) if name in classes else name, *rest[position:]]


def _split(argument: str) -> list[str]:
    """``--trainer.strategy=x`` as two arguments, anything else as it is."""
    return argument.split("=", 1) if argument.startswith(f"{_FLAG}=") else [argument]
