"""``NAME:OPTION=VALUE+OPTION=VALUE``: a strategy with options, as ``gradsync compare --strategies`` takes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, final

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.strategies import DDPStrategy

from .errors import UserError
from .report.methods import Method, method_of
from .strategies import STRATEGIES, ParameterServerStrategy
from .strategy_flag import check_name, strategy_class, strategy_name

_FLAG = "--trainer.strategy."
_OPTION_FLAG = re.compile(rf"{re.escape(_FLAG)}(?:init_args\.)?(\w+)")
_EXPECTED_TYPE = re.compile(r"Expected an? <class '([\w.]+)'>")
_SERVERS = "servers"


@final
@dataclass(frozen=True)
class Variant:
    """A strategy and the options that only its own runs get."""

    strategy: str
    """A name or a class path."""
    options: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str) -> Variant:
        """Raises: UserError for a part that is no ``OPTION=VALUE``, or an option that is there twice."""
        strategy, colon, rest = (part.strip() for part in text.partition(":"))
        options: dict[str, str] = {}
        for part in rest.split("+") if colon else ():
            name, equals, value = (word.strip() for word in part.partition("="))
            if not (name.isidentifier() and equals and value):
                raise UserError(
                    f"--strategies {text}: {part!r} is no OPTION=VALUE; wanted is something like "
                    "parameter_server:servers=2+transport=tcp"
                )
            if name in options:
                raise UserError(f"--strategies {text}: the option {name} is there twice")
            options[name] = value
        return Variant(strategy, tuple(options.items()))

    @property
    def text(self) -> str:
        """``servers=2+transport=tcp``, for ``gradsync fit --variant``; empty without options."""
        return "+".join(f"{name}={value}" for name, value in self.options)

    @property
    def method(self) -> Method:
        return method_of(strategy_name(self.strategy), self.text)

    def same_as(self, other: Variant) -> bool:
        """Whether only the order of options differs, if anything."""
        return self.strategy == other.strategy and dict(self.options) == dict(other.options)

    def fit_arguments(self) -> list[str]:
        """Of ``gradsync fit``, to be given after all others: so they win."""
        flags = [word for name, value in self.options for word in (f"{_FLAG}{name}", value)]
        return [*flags, "--variant", self.text] if flags else []

    def num_servers(self, extra: list[str]) -> int:
        """Processes that serve: as many as the variant says, else `extra`, other arguments of the fit.

        Raises:
            UserError: it is no number.
        """
        if strategy_name(self.strategy) != ParameterServerStrategy.strategy_name:
            return 0
        given = {**given_options(extra), **dict(self.options)}.get(_SERVERS)
        if given is None:
            return ParameterServerStrategy.num_servers
        if not given.isdigit() or int(given) < 1:
            raise UserError(f"{_FLAG}{_SERVERS} must be >= 1, got {given}")
        return int(given)

    def check(self, extra: list[str]) -> None:
        """Refuse now what the run would refuse; `extra` are other arguments of the fit, with options for all.

        Raises:
            UserError: an unknown name, an unknown option, or a value that the strategy does not take.
        """
        check_name(self.strategy)
        cls = strategy_class(self.strategy) or {**STRATEGIES, "ddp": DDPStrategy}.get(self.strategy)
        self.num_servers(extra)
        if not self.options:
            return
        if cls is None:
            known = ", ".join(["ddp", *STRATEGIES])
            raise UserError(
                f"--strategies {self.strategy}:{self.text}: options go with {known} or a class path, "
                f"not with {self.strategy!r}"
            )
        self._check_options(cls, extra)

    def make(self) -> Any:
        """The strategy, as a run would get it; only for ``ddp`` and those of gradsync, which have no side effects.

        Raises:
            UserError: it is another one, or as from :meth:`check`.
        """
        self.check([])
        known: dict[str, type] = {"ddp": DDPStrategy, **STRATEGIES}
        cls = known.get(strategy_name(self.strategy))
        if cls is None:
            raise UserError(f"--strategies {self.strategy}: only {', '.join(known)} can be looked into before a run")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        return cls(**{name: _parsed(parser, name, value) for name, value in self.options})

    def _check_options(self, cls: type, extra: list[str]) -> None:
        """By the parser that the run will use, and by constructing what has no side effects."""
        where = f"--strategies {self.strategy}:{self.text}"
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        known = {action.dest for action in parser._actions if action.dest != "help"}
        # Objects, which come with a flag for help on their classes; only the Trainer has a use for those of ours.
        plain = [name for name in known if "." not in name and f"{name}.help" not in known]
        for name, _ in self.options:
            if name not in known:
                raise UserError(f"{where}: {self.strategy} has no option {name!r}; it has {', '.join(sorted(plain))}")
        general = {name: value for name, value in given_options(extra).items() if name in plain}
        given = {**general, **dict(self.options)}
        try:
            values = {name: _parsed(parser, name, value) for name, value in given.items()}
            if cls in (DDPStrategy, *STRATEGIES.values()) and given.keys() <= set(plain):
                cls(**values)
        except (TypeError, ValueError, UserError) as error:
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _parsed(parser: ArgumentParser, name: str, value: str) -> Any:
    try:
        return parser.parse_args([f"--{name}={value}"])[name]
    except ArgumentError as error:
        types = [found for found in _EXPECTED_TYPE.findall(str(error)) if found != "NoneType"]
        wanted = f"must be {' or '.join(types)}" if types else "has another type"
        raise UserError(f"{name} {wanted}, got {value!r}") from error


def given_options(arguments: list[str]) -> dict[str, str]:
    """Options of the strategy among arguments of ``gradsync fit``, as ``--flag value`` or ``--flag=value``."""
    options = {}
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if found := _OPTION_FLAG.fullmatch(flag):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            options[found[1]] = value if equals else following
    return options


def parse_variants(text: str) -> list[Variant]:
    """``A,B:OPTION=VALUE``; what is there twice counts once.

    Raises:
        UserError: see :meth:`Variant.parse`.
    """
    variants: list[Variant] = []
    for part in filter(None, map(str.strip, text.split(","))):
        variant = Variant.parse(part)
        if not any(variant.same_as(other) for other in variants):
            variants.append(variant)
    return variants


def check_variants(variants: list[Variant], extra: list[str]) -> None:
    """Raises: UserError for one that no run can use, and for two whose files would have the same name."""
    stems: dict[str, Variant] = {}
    for variant in variants:
        variant.check(extra)
        other = stems.setdefault(variant.method.stem.lower(), variant)
        if other is not variant:
            ours, theirs = (f"{each.strategy}:{each.text}".rstrip(":") for each in (variant, other))
            raise UserError(f"--strategies: {theirs} and {ours} would write the same files: leave one out")
