"""One process's spans in a file of its own, a line each: what is left of a run that is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from ..report.trace_file import process_file

Span = tuple[str, str, int, int, dict[str, Any]]


@final
class SpanFile:
    """Keeps spans in memory and writes them when told to; the file of an earlier run is replaced.

    Lines are JSON: an object has facts about the process, an array is a span: name, category, start and end in
    ``time.perf_counter_ns``, arguments.

    Args:
        number: Of the process among all of the run, servers first.
        facts: About it, for the file's first line.
    """

    def __init__(self, number: int, facts: dict[str, Any]) -> None:
        self._number = number
        self._facts: list[dict[str, Any]] = [facts]
        self._spans: list[Span] = []
        self._is_closed = False
        self.path: Path | None = None

    def open(self, folder: str) -> None:
        self.path = process_file(Path(folder), self._number)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self.flush()

    def add(self, name: str, category: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        self._spans.append((name, category, start_ns, end_ns, args))

    def tell(self, **facts: Any) -> None:
        """Add facts."""
        self._facts.append(facts)

    def flush(self) -> None:
        """Write what came since the last time, if the file is open."""
        if self.path is None:
            return
        facts, self._facts = self._facts, []
        spans, self._spans = self._spans, []  # another thread adds to the old list or to the new one
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in (*facts, *spans))

    def close(self) -> None:
        """Nothing more will come; a second time does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.tell(complete=True)
            self.flush()
