"""Reading a JSON object that may be wrong anywhere: what is wrong is named, and reading goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from .figures import NAN

_PROBLEMS_SHOWN_PER_FILE = 4
_DEEPEST = 40
_TOO_LARGE = 1e50  # beyond every loss in 32 bits, and its square is still a number


class UnusableError(Exception):
    """A file lacks what a report cannot do without; the text says what."""


@final
class Fields:
    """One JSON object. Absent figures are NaN, absent texts empty; wrong ones too, and `problems` names them."""

    def __init__(self, record: Mapping[str, Any], problems: list[str], where: str = "") -> None:
        self._record = record
        self._problems = problems
        self._where = where

    def __contains__(self, key: str) -> bool:
        return key in self._record

    def number(self, key: str, *, minimum: float = -math.inf, nullable: bool = False) -> float:
        """A finite number, else NaN. `nullable`: null is a legitimate way to say that there is none."""
        value = self._record.get(key)
        if key not in self._record or (nullable and value is None):
            return NAN
        number = finite(value)
        if math.isnan(number) or number < minimum:
            wanted = "a finite number" if minimum == -math.inf else f"a finite number >= {minimum:g}"
            self._complain(key, wanted, value)
            return NAN
        return number

    def text(self, key: str) -> str:
        value = self._record.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            self._complain(key, "a text", value)
            return ""
        return one_line(value)

    def flag(self, key: str) -> bool | None:
        """True or false; None if the file does not say."""
        value = self._record.get(key)
        if value is not None and not isinstance(value, bool):
            self._complain(key, "true or false", value)
            return None
        return value

    def count(self, key: str) -> int | None:
        """A whole number from 1; None if the file does not say."""
        number = self.number(key, minimum=1, nullable=True)
        if math.isnan(number):
            return None
        if number != int(number):
            self._complain(key, "a whole number", number)
            return None
        return int(number)

    def record(self, key: str, *, where: str = "") -> Fields:
        """The object under `key`, empty if there is none."""
        return Fields(self.mapping(key), self._problems, where or f"{self._where}{key}.")

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._record.get(key)
        if value is not None and not isinstance(value, dict):
            self._complain(key, "an object", value)
            return {}
        return value or {}

    def records(self, key: str, name: str) -> list[Fields]:
        """The objects in the list under `key`; what is none is left out. Problems call the k-th "`name` k"."""
        found = []
        for index, value in enumerate(self._list(key), start=1):
            if isinstance(value, dict):
                found.append(Fields(value, self._problems, f"{self._where}{name} {index}: "))
            else:
                self._complain(f"{name} {index}", "an object", value)
        return found

    def numbers(self, key: str, name: str) -> tuple[float, ...]:
        """The list under `key`, with NaN for what is no finite number; one problem for all of them."""
        values = self._list(key)
        numbers = tuple(finite(value) for value in values)
        broken = [index for index, number in enumerate(numbers) if math.isnan(number)]
        if broken:
            first = f"{name} {broken[0] + 1}, is {_shown(values[broken[0]])}"
            self._problems.append(
                f"{self._where}{key}: {len(broken)} of {len(values)} are not finite numbers; the first, {first}"
            )
        return numbers

    def _list(self, key: str) -> list[Any]:
        value = self._record.get(key)
        if value is not None and not isinstance(value, list):
            self._complain(key, "a list", value)
            return []
        return value or []

    def _complain(self, key: str, wanted: str, got: Any) -> None:
        self._problems.append(f"{self._where}{key} must be {wanted}, got {_shown(got)}")


def finite(value: Any) -> float:
    """`value` as a float if JSON wrote it as a finite number, else NaN; nothing real is as large as `_TOO_LARGE`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NAN
    try:
        number = float(value)
    except OverflowError:
        return NAN
    return number if abs(number) < _TOO_LARGE else NAN


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: it goes into tables, pictures and terminals."""
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """`text` with a blank for each character that no file or terminal should get; blanks stay, as in paths."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = one_line(repr(value))
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file at `path`. Raises: UnusableError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except OSError as error:
        raise UnusableError(f"it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"it is no complete JSON, half-written perhaps ({one_line(str(error))})") from error
    if _is_too_deep(content):
        raise UnusableError(f"its objects and lists are nested more than {_DEEPEST} deep")
    if not isinstance(content, dict):
        raise UnusableError(f"it must hold a JSON object, got {type(content).__name__}")
    return content


def _is_too_deep(content: Any) -> bool:
    """Whether walking through `content` recursively could end in a RecursionError."""
    level = [content]
    for _ in range(_DEEPEST):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [each for items in inner if isinstance(items, list) for each in items if isinstance(each, (dict, list))]
    return bool(level)


def shortened(problems: Sequence[str]) -> list[str]:
    """One file's problems: those of several epochs as one, the first few, and how many more there are."""
    epochs: dict[str, list[str]] = {}
    for problem in problems:
        epoch, _, text = problem.partition(": ") if problem.startswith("epoch ") else ("", "", problem)
        epochs.setdefault(text, []).append(epoch.removeprefix("epoch "))
    lines = [f"{text} in epoch {', '.join(where)}" if where[0] else text for text, where in epochs.items()]
    if len(lines) <= _PROBLEMS_SHOWN_PER_FILE:
        return lines
    return [*lines[:_PROBLEMS_SHOWN_PER_FILE], f"and {len(lines) - _PROBLEMS_SHOWN_PER_FILE} more such problems"]
