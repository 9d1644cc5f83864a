"""Whether what is installed is what the package asks for."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from .check import Check

_SHOWN = ("torch", "lightning", "torchvision", "tensorboard")
_REASONS = {"torch": "earlier ones can be attacked through torch.load, CVE-2026-24747"}


def check_versions(requirements: Iterable[str] | None = None) -> Check:
    """``requirements``: by default those that the installed package declares."""
    asked = [Requirement(text) for text in (_declared() if requirements is None else requirements)]
    needed = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {name: _installed(name) for name in {*_SHOWN, *(requirement.name for requirement in needed)}}
    wrong = [r for r in needed if not r.specifier.contains(found[r.name] or "0", prereleases=True) or not found[r.name]]
    values = {"python": platform.python_version(), **dict(sorted(found.items()))}
    if wrong:
        told = "; ".join(_told(requirement, found[requirement.name]) for requirement in wrong)
        return Check("versions", "FAIL", told, shlex.join(["pip", "install", *map(_plain, wrong)]), values)
    shown = [f"Python {platform.python_version()}", *(f"{name} {found[name]}" for name in _SHOWN)]
    return Check("versions", "ok", ", ".join(shown), values=values)


def _declared() -> list[str]:
    try:
        return requires("gradsync") or []
    except PackageNotFoundError:  # imported from a checkout that nobody installed
        return ["torch>=2.10", "lightning>=2.6,<2.7"]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _told(requirement: Requirement, found: str | None) -> str:
    reason = f" ({_REASONS[requirement.name]})" if requirement.name in _REASONS else ""
    return f"{_plain(requirement)} is needed{reason}, {found or 'none'} is installed"


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
