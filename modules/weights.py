"""Pretrained weights for torchvision's classification networks: by torchvision's name, or from a local file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from ..errors import UserError

StateDict = dict[str, Tensor]

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_WRAPPERS = ("state_dict", "model")
# Of DistributedDataParallel, other training scripts, this project's checkpoints, torch.compile.
_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
# Second outputs of GoogLeNet and Inception, which are not built.
_UNUSED = ("AuxLogits.", "aux1.", "aux2.")
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_weights(net: nn.Module, arch: str, weights: str) -> str | None:
    """Load the weights named or filed under ``weights`` into ``net``, in place.

    A final classifier for another number of classes is left as it is in ``net``; the returned line says so.

    Raises:
        UserError: no such name or file, not readable, or not for this network.
    """
    state = _read(arch, weights)
    wanted = net.state_dict()
    head = _last_module(wanted)
    differences = list(_differences(wanted, state))
    if not differences:
        net.load_state_dict(state)
        return None
    if all(_other_number_of_classes(key, wanted, state, head) for key in differences):
        net.load_state_dict({key: value for key, value in state.items() if key not in differences}, strict=False)
        theirs, ours = (side[differences[0]].shape[0] for side in (state, wanted))
        return (
            f"weights {weights}: the final classifier `{head}` is for {theirs} classes, so a fresh one for {ours} stays"
        )
    key = differences[0]
    raise UserError(
        f"--model.weights {weights} does not fit --model.arch {arch}: {len(differences)} of {len(wanted)} entries"
        f" differ, first `{key}`: {_shape(state, key)} in the weights, {_shape(wanted, key)} in the network"
    )


def _read(arch: str, weights: str) -> StateDict:
    path = Path(weights).expanduser()
    is_file = path.exists() or path.suffix in _FILE_SUFFIXES or path.name != weights
    state = _read_file(path) if is_file else _read_published(arch, weights)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {_OLD_DENSENET_KEY.sub(r"\1\2", k): v for k, v in state.items() if not k.startswith(_UNUSED)}


def _read_file(path: Path) -> StateDict:
    if not path.is_file():
        raise UserError(f"--model.weights: no such file: {path.absolute()}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"--model.weights {path}: no file of plain weights: {str(error).splitlines()[0]}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"--model.weights {path}: expected a state dict (names to tensors), got {_kind(content)}")
    return cast(StateDict, content)


def _read_published(arch: str, name: str) -> StateDict:
    """From torchvision's cache, downloaded into it where it is not there yet."""
    published = models.get_model_weights(arch)
    if name not in published.__members__:
        raise UserError(
            f"--model.weights {name}: no such file, and torchvision publishes no weights of that name for {arch};"
            f" it has {', '.join(published.__members__)}"
        )
    try:
        return models.get_model(arch, weights=published[name], progress=False).state_dict()
    except URLError as error:
        raise UserError(
            f"--model.weights {name}: cannot download {published[name].url}: {error.reason}.\n"
            "Download it elsewhere and give the file's path to --model.weights."
        ) from error


def _differences(wanted: StateDict, state: StateDict) -> Iterator[str]:
    """Keys that are on one side only or differ in shape, in the order of the network."""
    for key, value in wanted.items():
        # Files of before 2018 lack the counter of BatchNorm, and torch adds it.
        if key not in state and key.endswith("num_batches_tracked"):
            continue
        if key not in state or state[key].shape != value.shape:
            yield key
    yield from (key for key in state if key not in wanted)


def _last_module(state: StateDict) -> str:
    return next(reversed(state)).rpartition(".")[0]


def _other_number_of_classes(key: str, wanted: StateDict, state: StateDict, head: str) -> bool:
    return (
        key.rpartition(".")[0] == head
        and key in wanted
        and key in state
        and state[key].shape[1:] == wanted[key].shape[1:]
    )


def _shape(state: StateDict, key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "missing"


def _kind(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(str, list(content)[:3]))}"
    return type(content).__name__
