"""``--filter TEXT``: parameters whose name holds it, or fits it as a pattern."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import replace

from ..errors import UserError
from .entries import Entry, Listing

_PATTERN = set("*?[")
_NUM_NEAREST = 5


def filtered(listing: Listing, text: str) -> Listing:
    """Raises: UserError, naming what comes nearest, if nothing is left."""
    kept = [entry for entry in listing.entries if any(_fits(name, text) for name in (entry.name, *entry.tied))]
    if not kept:
        raise UserError(
            f"--filter {text}: no parameter of {listing.title} has that in its name; {_hint(listing, text)}"
        )
    return replace(listing, entries=kept)


def _fits(name: str, text: str) -> bool:
    if _PATTERN & set(text):
        return fnmatch.fnmatchcase(name, text)
    return text in name


def _hint(listing: Listing, text: str) -> str:
    names = list(dict.fromkeys(part for entry in listing.entries for part in _parts(entry)))
    nearest = difflib.get_close_matches(text, names, n=_NUM_NEAREST, cutoff=0.4)
    if nearest:
        return f"nearest: {', '.join(nearest)}"
    first = dict.fromkeys(entry.name.partition(".")[0] for entry in listing.entries)
    return f"names begin with {', '.join(list(first)[:_NUM_NEAREST])}"


def _parts(entry: Entry) -> list[str]:
    """``layer4``, ``layer4.0``, ``0``, ...: every module that it is in, and the pieces of its name."""
    words = entry.name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words) + 1)] + [w for w in words if not w.isdecimal()]
