"""For argparse: numbers in their range, or a line that says what was expected. Raise: ArgumentTypeError."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

_ENDLESS = 1e6


def positive_int(text: str) -> int:
    return _whole_number(text, minimum=1)


def non_negative_int(text: str) -> int:
    return _whole_number(text, minimum=0)


def _whole_number(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise ArgumentTypeError(f"must be a whole number >= {minimum}, got {text!r}")
    return int(text)


def positive_float(of: str = "") -> Callable[[str], float]:
    """A number above 0 and below a million; ``of``: its unit, for the error."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < _ENDLESS:
            raise ArgumentTypeError(f"must be a number{f' of {of}' if of else ''} > 0, got {text!r}")
        return value

    return parse
