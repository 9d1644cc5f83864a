"""Numbers of parameters and bytes for people."""

from __future__ import annotations

_UNITS = ("", "k", "M", "B", "T")


def short_count(count: int) -> str:
    """``25.6 M``: three digits; all of a number below a thousand."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}".rstrip()


def size(num_bytes: float) -> str:
    """In B, KiB, MiB or GiB, whichever has one to three digits before the point."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB"):
        num_bytes /= 1024
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.2f} GiB"
