"""Draws one step of a trace (``--trace_steps``) as a picture, where https://ui.perfetto.dev is out of reach.

python benchmarks/draw_trace.py runs/traced/trace.json step.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

# Paul Tol's bright scheme, told apart by colour-blind eyes.
COLOURS = {
    "data": "#BBBBBB",
    "forward": "#66CCEE",
    "backward": "#4477AA",
    "optimizer": "#CCBB44",
    "push, all-reduce, reduce-scatter, receive": "#EE6677",
    "pull, all-gather, send": "#AA3377",
    "reduce": "#228833",
    "wait": "#F2F2F2",
    "exchange": "#F8C4CB",
}
_KINDS = {
    **dict.fromkeys(("push", "all_reduce", "reduce_scatter", "receive"), "push, all-reduce, reduce-scatter, receive"),
    **dict.fromkeys(("pull", "all_gather", "send"), "pull, all-gather, send"),
}
_HIDDEN = ("step", "compute", "other")
"""They hold what is drawn."""


def kind_of(event: dict[str, Any]) -> str | None:
    """Which colour a slice has; None for one that is not drawn."""
    name = event["name"].split(" ")[0].rstrip(",")
    kind = _KINDS.get(name, name)
    return None if name in _HIDDEN else kind if kind in COLOURS else "wait"


def rows_of(content: dict[str, Any], step: int | None) -> tuple[dict[str, list[dict[str, Any]]], float, float]:
    """Slices per row, top row first, and the begin and end of the step (the first one if None), in us."""
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    steps = [e for e in events if e["cat"] == "step" and (step is None or e["args"]["step"] == step)]
    if not steps:
        raise SystemExit(f"the trace has no step {step}")
    number = steps[0]["args"]["step"]
    chosen = [event for event in steps if event["args"]["step"] == number]
    begin, end = min(e["ts"] for e in chosen), max(e["ts"] + e["dur"] for e in chosen)
    named = {e["pid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"}
    titles = {(e["pid"], e["tid"]): e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    rows = {key: f"{named[key[0]]}: {title}" for key, title in sorted(titles.items())}
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in rows.values()}
    for event in events:
        if event["ts"] < end and event["ts"] + event["dur"] > begin:
            found[rows[event["pid"], event["tid"]]].append(event)
    return {title: inside for title, inside in found.items() if inside}, begin, end


def draw(content: dict[str, Any], picture: Path, step: int | None, begin_ms: float) -> None:
    rows, begin, end = rows_of(content, step)
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.5 * len(rows)), layout="constrained")
    used: set[str] = set()
    for row, events in enumerate(rows.values()):
        bars: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event in sorted(events, key=lambda e: -e["dur"]):  # the inner ones come on top
            if (kind := kind_of(event)) is not None:
                bars[kind].append(((event["ts"] - begin) / 1000, event["dur"] / 1000))
        for kind in sorted(bars, key=lambda kind: -max(width for _, width in bars[kind])):
            axes.broken_barh(bars[kind], (row - 0.38, 0.76), color=COLOURS[kind], edgecolor="black", linewidth=0.3)
        used |= bars.keys()
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(begin_ms, (end - begin) / 1000)
    axes.set_xlabel("ms since the step began")
    handles = [Patch(facecolor=colour, edgecolor="black", label=k) for k, colour in COLOURS.items() if k in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--step", type=int, default=None, help="which of the recorded ones (default: the first)")
    parser.add_argument("--begin-ms", type=float, default=0.0, help="leave out what is earlier in the step")
    given = parser.parse_args()
    draw(json.loads(given.trace.read_text()), given.picture, given.step, given.begin_ms)
