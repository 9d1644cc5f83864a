"""Spans go to whoever listens, and to nobody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gradsync.comm.timeline import Timeline
from gradsync.comm.tracer import Tracer


class Kept:
    def __init__(self) -> None:
        self.spans: list[tuple[str, str, int, int, dict[str, Any]]] = []
        self.num_flushed = 0

    def add(self, *span: Any) -> None:
        self.spans.append(span)

    def flush(self) -> None:
        self.num_flushed += 1

    def open(self, folder: str) -> None:
        raise AssertionError("no strategy here")


def test_nothing_is_made_when_nobody_listens() -> None:
    tracer = Tracer()
    assert tracer.part("push", bucket=1) is tracer.range("all_reduce")  # one object that does nothing, for all


def test_a_recorder_gets_parts_and_communication_but_no_ranges() -> None:
    timeline, kept = Timeline(), Kept()
    timeline.tracer.recorder = kept
    before = time.perf_counter_ns()
    with timeline.tracer.part("push", bucket=1, part=0):
        pass
    with timeline.tracer.range("all_reduce", bucket=1):
        pass
    timeline.add_span(5, 9, 100, "all_reduce", bucket=1)
    timeline.add_span(5, 9)
    (push, *communication) = kept.spans
    assert (push[0], push[1], push[4]) == ("push bucket 1", "part", {"bucket": 1, "part": 0})
    assert before <= push[2] <= push[3] <= time.perf_counter_ns()
    assert communication == [
        ("all_reduce bucket 1", "communication", 5, 9, {"bytes": 100, "bucket": 1}),
        ("communication", "communication", 5, 9, {"bytes": 0}),
    ]


def test_a_block_that_fails_is_not_recorded_and_its_error_goes_on() -> None:
    tracer = Tracer()
    tracer.recorder = kept = Kept()
    with pytest.raises(KeyError), tracer.part("push"):
        raise KeyError
    assert not kept.spans


def test_profilers_get_both() -> None:
    tracer, opened = Tracer(), []

    @contextmanager
    def note(name: str) -> Iterator[None]:
        opened.append(name)
        yield

    tracer.profile = note
    with profile(activities=[ProfilerActivity.CPU]) as profiled, tracer.part("push", bucket=2), tracer.range("wait"):
        torch.ones(2)
    assert {event.name for event in profiled.events()} >= {"gradsync::push bucket 2", "gradsync::wait"}
    assert opened == ["push", "wait"]


def test_a_server_records_while_some_worker_does() -> None:
    tracer, kept = Tracer(), Kept()
    tracer.requested(0)  # nobody records here
    tracer.answered(0)
    assert tracer.recorder is None
    tracer.on_request = kept
    seen = []
    for event, worker in ((tracer.requested, 0), (tracer.answered, 1), (tracer.requested, 1), (tracer.answered, 0)):
        event(worker)
        seen.append(tracer.recorder is kept)
    assert seen == [True] * 4
    tracer.answered(1)
    assert tracer.recorder is None
    assert kept.num_flushed == 1
