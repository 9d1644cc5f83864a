"""Packages that gradsync does not need, and imports when a model of theirs is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ..errors import UserError


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def optional(package: str, what: str) -> ModuleType:
    """Import it. Raises: UserError with the command that installs it; ``what`` needs it."""
    if not is_installed(package):
        raise UserError(f"{what} needs the package {package}: pip install {package}")
    return importlib.import_module(package)
