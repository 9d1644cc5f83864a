"""A model and a file of weights together: whether they belong together, and the model's list with the file's values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from ..errors import UserError
from .entries import Entry, Listing

_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel


def with_checkpoint(model: Listing, file: Listing) -> Listing:
    """The model's parameters as the file has them. What the model has no parameter for must be a buffer of it.

    Raises:
        UserError: the file is of another model; the first difference is named.
    """
    assert model.module is not None
    ours = {name for entry in model.entries for name in (entry.name, *entry.tied)}
    known = ours | {name for name, _ in model.module.named_buffers()}
    called = _translation([name for entry in file.entries for name in (entry.name, *entry.tied)], known)
    theirs = {called(name): entry for entry in file.entries for name in (entry.name, *entry.tied)}
    found = {e.name: next((theirs[n] for n in (e.name, *e.tied) if n in theirs), None) for e in model.entries}
    if differences := _differences(model.entries, found, theirs.keys() - known):
        what = "; ".join(differences)
        raise UserError(f"--checkpoint: {file.title}, is of another model than {model.title}: {what}")
    entries = [_joined(entry, found[entry.name]) for entry in model.entries]
    notes = [*model.notes, *(note for note in file.notes if "MODEL" not in note)]
    built_with = {**model.built_with, "checkpoint": file.built_with}
    return Listing(f"{model.title} with {file.title}", entries, built_with, notes, model.module)


def _joined(entry: Entry, found: Entry | None) -> Entry:
    assert found is not None
    return replace(entry, shape=found.shape, dtype=found.dtype, count=found.count, num_bytes=found.num_bytes,
                   is_sparse=found.is_sparse, load=found.load)  # fmt: skip


def _differences(entries: list[Entry], found: dict[str, Entry | None], unknown: Iterable[str]) -> list[str]:
    missing, others = [name for name, entry in found.items() if entry is None], sorted(unknown)
    shapes = {e.name: (e.shape, f.shape) for e in entries if (f := found[e.name]) and e.shape not in (None, f.shape)}
    said = []
    if missing:
        said.append(f"it lacks {len(missing)} of {len(found)} parameters, first {missing[0]}")
    if others:
        said.append(f"it has {len(others)} that the model has not, first {others[0]}")
    if shapes:
        name, (wanted, got) = next(iter(shapes.items()))
        said.append(
            f"{len(shapes)} have another shape, first {name}: {list(got or ())} instead of {list(wanted or ())}"
        )
    return said


def _translation(theirs: list[str], ours: Collection[str]) -> Callable[[str], str]:
    """From names in the file to those in the model: one of them may be the other's attribute (``net.``, ``model.``)."""
    bare = {name: _unwrapped(name) for name in theirs}
    inner, outer = _common_prefix(bare.values()), _common_prefix(ours)
    for removed, added in (("", ""), (inner, ""), ("", outer), (inner, outer)):
        called = {name: added + short.removeprefix(removed) for name, short in bare.items()}
        if not set(ours).isdisjoint(called.values()):
            return called.__getitem__
    return bare.__getitem__


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _common_prefix(names: Iterable[str]) -> str:
    """``net.`` if all names begin so."""
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    return f"{first.pop()}." if len(first) == 1 and first != {""} else ""
