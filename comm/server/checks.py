"""What a worker's message must hold, checked in one place before anything of it is used.

Types only: sizes of payloads, and whose turn it is, are for those who know the state of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .protocol import Kind, Message, ProtocolError

_ROW = 6
"""Entries of a tensor table's row: name, shape, stride, dtype, trainable, dtype on the wire."""
_JOINING_ROW = (str, list, list, str, bool, int, int)
"""Of what joins an optimizer: name, shape, stride, dtype, trainable, and the elements, from and to."""


def check_fields(worker: int, message: Message) -> None:
    """Raises ProtocolError, naming the field that is missing or of another type."""
    fields = _FIELDS.get(message.kind, {})
    if fields and not isinstance(message.info, dict):
        raise ProtocolError(f"worker {worker} sends {message.kind.name} without its fields")
    for name, fits in fields.items():
        if name not in message.info or not fits(message.info[name]):
            raise ProtocolError(f"worker {worker} sends {message.kind.name} with a missing or malformed {name!r}")


def check_settings(worker: int, groups: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Raises ProtocolError unless ``groups`` are settings that the parameter groups ``own`` can take."""
    if len(groups) != len(own):
        raise ProtocolError(f"worker {worker} sends settings of {len(groups)} parameter groups, not {len(own)}")
    for group, settings in zip(own, groups, strict=True):
        for key in settings.keys() & group.keys():
            if not _replaces(group[key], settings[key]):
                raise ProtocolError(f"worker {worker} sends {key!r} of another type than the optimizer has")


def _replaces(current: Any, value: Any) -> bool:
    if isinstance(current, (Tensor, int, float)):
        return isinstance(value, (int, float))
    if isinstance(current, (tuple, list)):
        return _is_list_of(value, lambda entry: isinstance(entry, (int, float))) and len(value) == len(current)
    return current is None or isinstance(value, type(current))


def _is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(fits(entry) for entry in value)


def _is_table(value: Any) -> bool:
    return _is_list_of(value, lambda row: isinstance(row, list) and len(row) == _ROW)


def _is_joining(value: Any) -> bool:
    return _is_list_of(value, lambda row: isinstance(row, list) and tuple(map(type, row)) == _JOINING_ROW)


def _is_new_group(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("settings"), dict) and _is_joining(value.get("rows"))


def _is_clip(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("algorithm", "") in (None, "norm", "value")
        and isinstance(value.get("value"), (int, float))
    )


_FIELDS: dict[Kind, dict[str, Callable[[Any], bool]]] = {
    Kind.HELLO: {
        "tables": lambda value: _is_list_of(value, _is_table),
        "memory": lambda value: value is None or isinstance(value, dict),
    },
    Kind.STEP: {
        "used": lambda value: _is_list_of(value, lambda flags: _is_list_of(flags, lambda f: isinstance(f, bool))),
        "groups": lambda value: _is_list_of(value, lambda group: isinstance(group, dict)),
        "clip": _is_clip,
        "sequence": lambda value: type(value) is int,
    },
    Kind.GROW: {
        "unfrozen": _is_joining,
        "groups": lambda value: _is_list_of(value, _is_new_group),
        "memory": lambda value: value is None or isinstance(value, dict),
    },
    Kind.BYE: {"info": lambda value: True, "tree": lambda value: isinstance(value, dict)},
    Kind.FAIL: {"error": lambda value: isinstance(value, str)},
}
