"""Where a model comes from: what ``MODEL`` on the command line means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from . import fit_model, hugging_face, timm_models, torchvision_models
from .entries import Listing

_YAML = (".yaml", ".yml")
_WEIGHTS = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
_KINDS = {"torchvision": torchvision_models.load, "timm": timm_models.load, "hf": hugging_face.load}


def find_model(model: str | None, fit_arguments: Sequence[str] = (), with_values: bool = False) -> Listing:
    """The model that ``model`` names, built where that takes no memory; nothing is trained.

    Args:
        model: A network of torchvision or timm, a folder or name of Hugging Face, the path of a LightningModule, a
            configuration of ``gradsync fit``, or ``KIND:NAME``. None: the model of ``gradsync fit``.
        fit_arguments: More arguments of ``gradsync fit``, for the three that go through it.
        with_values: Make it with the values that training would begin with.

    Raises:
        UserError: there is no such model, or what it needs is not installed.
    """
    if (arguments := _fit_arguments(model)) is not None:
        return fit_model.load([*arguments, *fit_arguments], with_values)
    assert model is not None
    if fit_arguments:
        raise UserError(
            f"arguments after -- are those of gradsync fit, which {model} does not go through: leave them out"
        )
    kind, colon, name = model.partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](name, with_values)
    return _load_unmarked(model, with_values)


def _fit_arguments(model: str | None) -> list[str] | None:
    """None: it is no model of ``gradsync fit``."""
    if model is None:
        return []
    path = Path(model)
    if path.suffix in _YAML and path.is_file():
        return ["--config", model]
    if path.is_dir() and (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        return ["--config", str(path / "config.yaml")]  # the folder of a run
    is_name = not path.exists() and "/" not in model and ":" not in model and path.suffix not in (*_YAML, *_WEIGHTS)
    if "." in model and is_name and not timm_models.knows(model):
        return ["--model", model]
    return None


def _load_unmarked(model: str, with_values: bool) -> Listing:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model} is a folder without config.json (of Hugging Face) or config.yaml (of a run)")
        return hugging_face.load(model, with_values)
    if path.suffix in (*_YAML, ".json", *_WEIGHTS):
        if not path.is_file():
            raise UserError(f"{model}: no such file: {path.absolute()}")
        if path.suffix == ".json":
            return hugging_face.load(model, with_values)
        raise UserError(f"{model} holds weights, not a model: gradsync inspect --checkpoint {model}")
    if torchvision_models.knows(model):
        return torchvision_models.load(model, with_values)
    if timm_models.knows(model):
        return timm_models.load(model, with_values)
    if "/" in model:
        return hugging_face.load(model, with_values)
    raise UserError(f"no model {model!r}: {_hint(model)}")


def _hint(model: str) -> str:
    known = list(dict.fromkeys([*torchvision_models.names(), *timm_models.names()]))
    kinds = "a LightningModule is named package.module.Class, one of Hugging Face by folder or OWNER/NAME"
    nearest = difflib.get_close_matches(model.lower(), known, n=5, cutoff=0.5)
    return f"nearest: {', '.join(nearest)}; {kinds}" if nearest else f"torchvision has no such network; {kinds}"
