"""One thing that was looked at, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

from .child import ask_in_child

Mark = Literal["ok", "warn", "FAIL"]
MIB, GIB = 2**20, 2**30

RESNET50_BYTES = 25_557_032 * 4
"""Of its parameters, and of its gradients, in float32: 97.5 MiB."""


@final
@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        mark: ``FAIL``: a run would not start, or would break; ``warn``: it would run, but worse than it could.
        found: What is there, with units.
        remedy: A command, a flag or what else to change; with every mark but ``ok``.
        values: The figures in ``found``, for programs; units in the names.
    """

    name: str
    mark: Mark
    found: str
    remedy: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.mark == "ok") == (self.remedy is None), "what is not ok says what to change, and only that"


def or_warning(name: str, check: Callable[[], Check]) -> Check:
    """The check's outcome; a warning where the machine does not even let it look (no /proc, say)."""
    try:
        return check()
    except (OSError, ValueError, KeyError) as error:
        found = f"could not be looked at: {type(error).__name__}: {error}"
        return Check(
            name, "warn", found, "nothing, if your runs work: this machine is of a kind that is not known here"
        )


def or_failure(name: str, check: Callable[[], Check], patience_s: float) -> Check:
    """The outcome of a check that may hang, as storage does whose server has gone: a child process looks at it."""
    answer = ask_in_child(lambda: asdict(or_warning(name, check)), patience_s)
    if "error" in answer:
        remedy = "see whether the storage answers (`ls`, `mount`); if it is only slow: --timeout SECONDS"
        return Check(name, "FAIL", str(answer["error"]), remedy)
    return Check(**answer)


def gib(num_bytes: float) -> str:
    """As people read it: MiB below 1 GiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
