"""The tensors of a file, without reading their values: it is mapped into memory, whatever its size.

Nothing in a file is ever executed: torch's own files are loaded with ``weights_only``, and of safetensors only the
header is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .entries import Entry, Listing, entry_of, tied_notes
from .optional import optional

_FLAG = "--checkpoint"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INDEX = ".index.json"
_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors", _INDEX)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_CODE = re.compile(r"(?:GLOBAL|[Cc]lass) ([\w.]+\.\w+)")
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def list_file(path: Path) -> Listing:
    """The tensors in ``path``: a Lightning checkpoint, a state dict, a safetensors file, or an index of several.

    Raises:
        UserError: it is no such file, is damaged, or holds code.
    """
    _check_is_file(path)
    if path.name.endswith(_INDEX):
        return _list_index(path)
    if path.suffix == ".safetensors":
        return _list_safetensors(path)
    content, notes = _load(path)
    state = _state_dict(path, content)
    note = "a file does not say what is trainable and which tensors are buffers: name MODEL as well"
    title = f"{path.name}, a {'Lightning checkpoint' if 'pytorch-lightning_version' in content else 'file of torch'}"
    entries = list(_entries(state))
    return Listing(title, entries, _built_with(content), [*notes, *tied_notes(entries), note])


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.endswith(_SUFFIXES))
        there = f"it has {', '.join(inside[:5])}{' and more' if len(inside) > 5 else ''}" if inside else "it has none"
        raise UserError(f"{_FLAG} {path} is a folder: name a file of weights in it; {there}")
    if not path.is_file():
        raise UserError(f"{_FLAG}: no such file: {path.absolute()}")


# -- torch ---------------------------------------------------------------------------------------------------


def _load(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What it holds, and a note if it could not be mapped."""
    with path.open("rb") as file:
        magic = file.read(len(_ZIP))
    is_zip = magic == _ZIP
    if not is_zip and not magic.startswith(_PICKLE):
        raise UserError(f"{_FLAG} {path} is no file of torch or safetensors: {_kind_of(path)}")
    load: Callable[..., Any] = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what it then fails on
            content = load(mmap=True) if is_zip else load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{_FLAG} {path} {_what_is_wrong(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{_FLAG} {path} holds a {type(content).__name__}, wanted a state dict (names to tensors)")
    notes = [] if is_zip else [f"{path.name} is of torch's old format, which cannot be mapped: it was read as a whole"]
    return content, notes


def _kind_of(path: Path) -> str:
    return "it is empty" if path.stat().st_size == 0 else "its first bytes are of neither"


def _what_is_wrong(error: Exception) -> str:
    text = str(error)
    if "eights only load failed" in text:
        found = _CODE.search(text)
        return (
            f"holds more than tensors ({found[1] if found else 'or is damaged'}), which only running code from the "
            "file could make: save its state_dict() where you trust it, and name that file"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"is damaged or cut short ({first.split('. ')[0]})"


def _state_dict(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    state = content
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise UserError(f"{_FLAG} {path} holds no tensors by name: it has {keys}")
    return tensors


def _entries(state: dict[str, Tensor]) -> Iterator[Entry]:
    """A tensor that has several names counts once, under its first."""
    names: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(_identity(name, tensor), []).append(name)
    for own in names.values():
        tensor = state[own[0]]
        yield entry_of(own[0], tensor, None, own[1:], lambda tensor=tensor: tensor.detach())


def _identity(name: str, tensor: Tensor) -> Any:
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return name
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _built_with(content: dict[str, Any]) -> dict[str, Any]:
    known = {"epoch": "epoch", "global_step": "global_step", "pytorch-lightning_version": "lightning"}
    about = {name: content[key] for key, name in known.items() if key in content}
    parts = {"hyper_parameters": "model", "datamodule_hyper_parameters": "data"}
    return {**about, **{name: dict(content[key]) for key, name in parts.items() if content.get(key)}}


# -- safetensors ---------------------------------------------------------------------------------------------


def _list_safetensors(path: Path) -> Listing:
    safetensors: Any = optional("safetensors", f"{_FLAG} {path}")
    try:
        file = safetensors.safe_open(path, framework="pt")
        entries = [_safetensors_entry(file, name) for name in file.keys()]  # noqa: SIM118 (no dict)
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{_FLAG} {path} is damaged, or no safetensors file ({error})") from error
    return Listing(f"{path.name}, a safetensors file", entries, dict(file.metadata() or {}), [])


def _safetensors_entry(file: Any, name: str) -> Entry:
    part = file.get_slice(name)
    dtype, shape = _SAFETENSORS_DTYPES[part.get_dtype()], tuple(part.get_shape())
    like = torch.empty(shape, dtype=dtype, device="meta")
    return entry_of(name, like, None, (), lambda: file.get_tensor(name))


def _list_index(path: Path) -> Listing:
    """Files that together hold a model, as Hugging Face cuts large ones: ``{"weight_map": {tensor: file}}``."""
    try:
        files = dict.fromkeys(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{_FLAG} {path} is no index of weights: it has no weight_map") from error
    parts = [list_file(path.parent / Path(str(name)).name) for name in files]
    entries = [entry for part in parts for entry in part.entries]
    return Listing(f"{path.name}, {len(files)} files", entries, {"files": [str(name) for name in files]}, [])
