"""Parts of a network by their names, as the command line gives them: ``conv1,layer[12]``."""

from __future__ import annotations

import difflib
from collections.abc import Container
from fnmatch import fnmatchcase

from torch import nn

from ..errors import UserError


def parts_named(net: nn.Module, patterns: str, flag: str) -> list[str]:
    """Names of modules and parameters that match one of the patterns, which commas part, in the network's order.

    A pattern is a name or has wildcards of the shell, of which ``*`` stands for dots, too. What lies below a part that
    matches is not named.

    Args:
        patterns: Names are those within ``net``; ``net.``, under which checkpoints and `gradsync inspect` have them,
            may precede them.
        flag: The flag that gave the patterns, for errors.

    Raises:
        UserError: a pattern matches nothing; names the nearest parts.
    """
    wanted = [pattern.strip().removeprefix("net.") for pattern in patterns.split(",")]
    known = [name for name, _ in net.named_modules() if name] + [name for name, _ in net.named_parameters()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(f"{flag}: the network has no part {pattern!r}; {_hint(net, pattern, known)}")
    named = {name: None for name in known if any(fnmatchcase(name, pattern) for pattern in wanted)}
    return [name for name in named if not lies_below(name, named)]


def lies_below(name: str, parts: Container[str]) -> bool:
    """Whether the name is that of something within one of the parts."""
    steps = name.split(".")
    return any(".".join(steps[:depth]) in parts for depth in range(1, len(steps)))


def _hint(net: nn.Module, pattern: str, known: list[str]) -> str:
    if nearest := difflib.get_close_matches(pattern, known, n=5):
        return f"nearest: {', '.join(nearest)}"
    return f"its parts: {', '.join(name for name, _ in net.named_children())}"
