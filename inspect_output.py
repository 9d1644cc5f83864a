"""What ``gradsync inspect`` shows: parameters, a tree of modules, buckets, what a model was built with; or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, final

import torch
import yaml
from rich.console import Console

from .inspection.bucket_plan import PlannedBucket, StrategyPlan, numbers_by_name
from .inspection.entries import Entry, Listing
from .inspection.sizes import short_count, size
from .inspection.statistics import Statistics, statistics_of
from .report.terminal import say

_MOST_BUCKETS = 8


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else "x".join(map(str, shape)) or "scalar"


def _state(trainable: bool | None) -> str:
    return {True: "trainable", False: "frozen", None: "-"}[trainable]


# -- JSON ----------------------------------------------------------------------------------------------------


def print_json(listing: Listing, with_values: bool, plans: Sequence[StrategyPlan]) -> None:
    """One array, one record per parameter, written as the values are read."""
    numbers = {plan.strategy: numbers_by_name(plan) for plan in plans}
    for position, entry in enumerate(listing.entries):
        record: dict[str, Any] = {
            "name": entry.name,
            "shape": None if entry.shape is None else list(entry.shape),
            "dtype": _dtype(entry.dtype),
            "count": entry.count,
            "bytes": entry.num_bytes,
            "trainable": entry.trainable,
            "tied": list(entry.tied),
            "sparse": entry.is_sparse,
        }
        if with_values:
            record |= asdict(_values(entry))
        if plans:
            record["buckets"] = {strategy: known.get(entry.name, []) for strategy, known in numbers.items()}
        print(("[" if position == 0 else ",\n ") + json.dumps(record, allow_nan=False), end="")
    print("]")


def _values(entry: Entry) -> Statistics:
    if entry.load is None:  # of a shape that is not known yet: there are none
        return Statistics(None, None, None, None, None, 0)
    return statistics_of(entry.load())


# -- text ----------------------------------------------------------------------------------------------------


@final
class Screen:
    """Lines are neither cut nor wrapped: names are there to be copied, and to be searched by other programs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def parameters(self, listing: Listing, with_values: bool) -> None:
        head = ["name", "shape", "count", "size", "dtype", ""]
        rows = [
            [e.name, _shape(e.shape), f"{e.count:,}", size(e.num_bytes), _dtype(e.dtype), _state(e.trainable)]
            for e in listing.entries
        ]
        if not with_values:
            self._table(head, rows, right={2, 3})
            return
        nonfinite: list[str] = []
        for row, entry in zip(rows, listing.entries, strict=True):
            found = _values(entry)
            row += [_number(value) for value in (found.mean, found.std, found.min, found.max)]
            row.append("-" if found.zeros is None else f"{100 * found.zeros:.1f} %")
            if found.num_nonfinite:
                nonfinite.append(f"{entry.name}: {found.num_nonfinite:,} values are NaN or infinite, and left out")
        self._table([*head, "mean", "std", "min", "max", "zeros"], rows, right={2, 3, 6, 7, 8, 9, 10})
        for line in nonfinite:
            self._say(line)

    def tree(self, listing: Listing, depth: int) -> None:
        """Modules to ``depth``, with all that is in each of them."""
        classes = {} if listing.module is None else {n: type(m).__name__ for n, m in listing.module.named_modules()}
        rows = [
            [classes.get("", "(file)"), "", *_sums(listing.entries)],
            *_branches(listing.entries, "", depth, classes),
        ]
        self._table(["module", "class", "parameters", "count", "size", "trainable"], rows, right={2, 3, 4, 5})

    def built_with(self, listing: Listing) -> None:
        text = yaml.safe_dump(_plain(listing.built_with), sort_keys=False, allow_unicode=True, width=10_000)
        self._say(text.rstrip())

    def plans(self, plans: Sequence[StrategyPlan]) -> None:
        """Bytes per step of all, then the buckets of each."""
        sizes = list(plans[0].bytes_per_step)
        rows = [
            [p.strategy, str(len(p.buckets)), size(max(b.num_bytes for b in p.buckets)),
             *(_range(p.bytes_per_step[n]) for n in sizes)]
            for p in plans
        ]  # fmt: skip
        self._say("Bytes per step: what each training process sends and receives, by how many there are")
        head = ["strategy", "buckets", "largest", *(f"{n} processes" if n > 1 else "1 process" for n in sizes)]
        self._table(head, rows, right=set(range(1, len(head))))
        for plan in plans:
            self._buckets(plan, len(plan.buckets) if len(plans) == 1 else _MOST_BUCKETS)

    def _buckets(self, plan: StrategyPlan, most: int) -> None:
        self._say(f"\n{plan.strategy}")
        for note in plan.notes:
            self._say(f"  {note}")
        rows = [_bucket_row(number, bucket) for number, bucket in enumerate(plan.buckets[:most])]
        head = ["bucket", "size", "dtype", "parameters", "first to last", ""]
        self._table(head, rows, right={0, 1, 3})
        if len(plan.buckets) > most:
            self._say(f"and {len(plan.buckets) - most} more: --strategies {plan.strategy} shows all")

    def summary(self, listing: Listing, num_all: int) -> None:
        entries = listing.entries
        of = f" of {num_all}" if len(entries) < num_all else ""
        self._say(f"\n{listing.title}: {len(entries)}{of} {_plural(listing, len(entries))}, {_total(entries)}")
        frozen = [entry for entry in entries if entry.trainable is False]
        trainable = [entry for entry in entries if entry.trainable]
        for what, part in (("trainable", trainable), ("frozen", frozen)) if frozen or trainable else ():
            self._say(f"{what}: {'all' if part and len(part) == len(entries) else _total(part) if part else 'none'}")
        for note in listing.notes:
            self._say(note)

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> None:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for number, row in enumerate([head, *rows]):
            cells = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self._say("  ".join(cells).rstrip(), "bold" if number == 0 else None)

    def _say(self, text: str, style: str | None = None) -> None:
        say(self._console, text, style)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _plural(listing: Listing, count: int) -> str:
    what = "tensor" if listing.module is None else "parameter"
    return what if count == 1 else f"{what}s"


def _total(entries: Sequence[Entry]) -> str:
    count = sum(entry.count for entry in entries)
    dtypes = ", ".join(dict.fromkeys(_dtype(entry.dtype) for entry in entries))
    return f"{count:,} ({short_count(count)}), {size(sum(entry.num_bytes for entry in entries))}, {dtypes}"


def _range(num_bytes: Sequence[int]) -> str:
    """Of all ranks: one figure where they do not differ visibly."""
    low, high = size(min(num_bytes)), size(max(num_bytes))
    return low if low == high else f"{low} to {high}"


def _bucket_row(number: int, bucket: PlannedBucket) -> list[str]:
    ends = bucket.names[0] if len(bucket.names) == 1 else f"{bucket.names[0]} .. {bucket.names[-1]}"
    where = "" if bucket.server is None else f"server {bucket.server}"
    if bucket.slices is not None:
        where = "; ".join(f"{n} slices of {_range(parts)}" for n, parts in bucket.slices.items())
    return [str(number), size(bucket.num_bytes), _dtype(bucket.dtype), str(len(bucket.names)), ends, where]


# -- tree ----------------------------------------------------------------------------------------------------


def _branches(entries: Sequence[Entry], prefix: str, depth: int, classes: dict[str, str]) -> Iterable[list[str]]:
    """Rows of the modules right below ``prefix``, each followed by its own."""
    if depth == 0:
        return
    level = prefix.count(".") + 1
    below: dict[str, list[Entry]] = {}
    for entry in entries:
        child, dot, _ = entry.name.removeprefix(prefix).partition(".")
        if dot:
            below.setdefault(child, []).append(entry)
    for child, own in below.items():
        path = f"{prefix}{child}"
        yield ["  " * level + child, classes.get(path, ""), *_sums(own)]
        yield from _branches(own, f"{path}.", depth - 1, classes)


def _sums(entries: Sequence[Entry]) -> list[str]:
    trainable = [entry.trainable for entry in entries]
    share = "-" if None in trainable else "all" if all(trainable) else f"{sum(map(bool, trainable))} of {len(entries)}"
    count, num_bytes = sum(entry.count for entry in entries), sum(entry.num_bytes for entry in entries)
    return [str(len(entries)), f"{count:,}", size(num_bytes), share]


def _plain(value: Any) -> Any:
    """For YAML: whatever else there is as its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
