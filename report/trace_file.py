"""The spans of all processes of a run in one Chrome trace (JSON), for https://ui.perfetto.dev or chrome://tracing.

A fit does this at its end. For one that was killed: ``python -m gradsync.report.trace_file RUN_FOLDER``.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("complete" events, in
microseconds; names by metadata events). Slices of one row must lie within each other or apart, so spans that overlap
otherwise go to rows of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from .files import atomic_write_text

FOLDER = "trace"
TRACE = "trace.json"
VIEWER = "https://ui.perfetto.dev"
_NS_PER_US = 1000.0


@final
@dataclass
class ProcessSpans:
    """What one process has written."""

    number: int
    facts: dict[str, Any] = field(default_factory=dict)
    spans: list[tuple[str, str, int, int, dict[str, Any]]] = field(default_factory=list)


def process_file(folder: Path, number: int) -> Path:
    """Where process ``number`` of a run writes its spans."""
    return folder / f"process_{number}.jsonl"


def read_process(path: Path) -> ProcessSpans:
    """Of a killed process too: a last line that is cut off is left out. Stamps are those of the run's first clock."""
    read = ProcessSpans(int(path.stem.rpartition("_")[2]))
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        content = json.loads(line)
        if isinstance(content, dict):
            read.facts.update(content)
        else:
            read.spans.append(tuple(content))
    offset = read.facts.get("offset_ns", 0)
    read.spans = [(name, kind, start + offset, end + offset, args) for name, kind, start, end, args in read.spans]
    return read


def merge_trace(run_folder: Path) -> Path | None:
    """Write the trace from the files of all processes; returns its path, or None if nothing was recorded."""
    paths = sorted((run_folder / FOLDER).glob(process_file(Path(), 0).name.replace("0", "*")))
    processes = sorted((read_process(path) for path in paths), key=lambda process: process.number)
    if not any(process.spans for process in processes):
        return None
    path = run_folder / TRACE
    atomic_write_text(path, json.dumps(chrome_trace(processes)) + "\n")
    return path


def chrome_trace(processes: Iterable[ProcessSpans]) -> dict[str, Any]:
    """One process row each, in their order; time begins with the first span."""
    processes = list(processes)
    origin_ns = min(start for process in processes for _, _, start, _, _ in process.spans)
    events = [event for process in processes for event in _events(process, origin_ns)]
    accuracy_us = max(process.facts.get("accuracy_ns", 0) for process in processes) / _NS_PER_US
    facts = {"processes": [process.facts for process in processes], "clocks_agree_within_us": accuracy_us}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}


def _events(process: ProcessSpans, origin_ns: int) -> list[dict[str, Any]]:
    pid = process.number
    names = {"process_name": {"name": process.facts.get("name", f"process {pid}")}}
    names["process_sort_index"] = {"sort_index": pid}
    events = [_metadata(pid, 0, name, args) for name, args in names.items()]
    for row, (title, spans) in enumerate(_rows(process), start=1):
        events += [_metadata(pid, row, "thread_name", {"name": title})]
        events += [_metadata(pid, row, "thread_sort_index", {"sort_index": row})]
        for name, kind, start, end, args in spans:
            times = {"ts": (start - origin_ns) / _NS_PER_US, "dur": (end - start) / _NS_PER_US}
            events.append({"name": name, "cat": kind, "ph": "X", "pid": pid, "tid": row, **times, "args": args})
    return events


def _metadata(pid: int, tid: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _rows(process: ProcessSpans) -> Iterable[tuple[str, list[Any]]]:
    """What the thread does that trains or serves, and, apart from it, the communication that a step's total counts."""
    main = "serving" if process.facts.get("is_server") else "training"
    for title, counts in ((main, False), ("communication", True)):
        lanes = _lanes(span for span in process.spans if (span[1] == "communication") == counts)
        for number, lane in enumerate(lanes):
            yield title if number == 0 else f"{title} {number + 1}", lane


def _lanes(spans: Iterable[Any]) -> list[list[Any]]:
    """As few lists as a simple rule finds in which any two spans are apart, or one is within the other."""
    lanes: list[list[Any]] = []
    open_ends: list[list[int]] = []
    for span in sorted(spans, key=lambda span: (span[2], -span[3])):
        _, _, start, end, _ = span
        for lane, ends in zip(lanes, open_ends, strict=True):  # noqa: B007 (used after the loop)
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or end <= ends[-1]:
                break
        else:
            lanes.append(lane := [])
            open_ends.append(ends := [])
        lane.append(span)
        ends.append(end)
    return lanes


def main(run_folder: str) -> None:
    """Merge what the processes of a run have left, and say where."""
    merged = merge_trace(Path(run_folder))
    print(f"{merged} (open it in {VIEWER})" if merged else f"no spans in {Path(run_folder) / FOLDER}")


if __name__ == "__main__":
    main(sys.argv[1])
