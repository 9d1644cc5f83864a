"""Models of Hugging Face by their configuration: a folder, a ``config.json``, or a name. Weights are never fetched."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..errors import UserError
from .building import build
from .entries import Listing, list_module
from .optional import optional


def load(name: str, with_values: bool) -> Listing:
    """Code that comes with a model is never run.

    Raises:
        UserError: without transformers, or for a configuration that it cannot read.
    """
    transformers: Any = optional("transformers", f"{name}, a model of Hugging Face,")
    transformers.logging.set_verbosity_error()
    config = _config(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, to its own developers
        module: nn.Module = build(lambda: _make(transformers, name, config), with_values)
    title = f"{type(module).__name__} of {name}"
    return list_module(title, module, {"hugging_face": name, "config": config.to_dict()})


def _config(transformers: Any, name: str) -> Any:
    try:
        # Without it, transformers asks at the keyboard whether to run what it has downloaded.
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: no configuration that transformers knows: {_first_line(error)}") from error


def _make(transformers: Any, name: str, config: Any) -> nn.Module:
    """The class that the configuration names, with its head; else the bare model of its type."""
    for architecture in config.architectures or []:
        cls = getattr(transformers, architecture, None)
        if cls is not None:
            return cls._from_config(config)  # what AutoModel.from_config calls
    try:
        return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"{name}: transformers has no model for it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
