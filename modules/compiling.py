"""``torch.compile`` by flag."""

from __future__ import annotations

import difflib
import shutil

import torch

from ..errors import UserError

_FLAG = "--model.compile"
_CPP_COMPILERS = ("g++", "clang++", "cl")


def check_backend(wanted: bool | str) -> str | None:
    """The backend's name; None where nothing is to be compiled.

    Raises:
        UserError: torch knows no such backend, or inductor lacks what it needs here.
    """
    if wanted is False:
        return None
    name = "inductor" if wanted is True else wanted
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        nearest = ", ".join(difflib.get_close_matches(name, known) or known)
        raise UserError(f"{_FLAG}: torch {torch.__version__} has no backend {name!r}; nearest: {nearest}")
    if name == "inductor" and not torch.cuda.is_available() and not any(map(shutil.which, _CPP_COMPILERS)):
        raise UserError(f"{_FLAG} {name} needs a C++ compiler such as g++: install one, or choose {_FLAG} aot_eager")
    return name
