"""Communication time is the length of a union, exposed time is waiting, a server's optimizer is neither."""

from __future__ import annotations

import random
import time

import pytest

from gradsync.comm.timeline import Timeline, union_ms

MS = 1_000_000


def test_union_against_counting_milliseconds() -> None:
    generator = random.Random(5)
    for _ in range(200):
        spans = [(s := generator.randrange(50), s + generator.randrange(20)) for _ in range(generator.randrange(8))]
        covered = {ms for start, end in spans for ms in range(start, end)}
        assert union_ms([(start * MS, end * MS) for start, end in spans]) == len(covered)


def test_overlapping_spans_count_once_and_bytes_add_up() -> None:
    timeline = Timeline()
    timeline.add_span(0, 10 * MS, 100)
    timeline.add_span(5 * MS, 20 * MS, 50)
    step = timeline.take_step()
    assert step is not None
    assert (step.total_ms, step.num_bytes, step.exposed_ms, step.overlapped_ms) == (20, 150, 0, 20)
    assert timeline.take_step() is None


def test_exposed_is_the_wait_after_the_last_gradient() -> None:
    timeline = Timeline()
    before = time.perf_counter()
    timeline.gradients_ready()
    time.sleep(0.02)
    timeline.synchronized()
    waited_ms = 1e3 * (time.perf_counter() - before)
    time.sleep(0.02)  # not waiting any more
    step = timeline.take_step()
    assert step is not None
    assert 20 <= step.exposed_ms <= waited_ms


def test_a_servers_optimizer_time_is_taken_out() -> None:
    timeline = Timeline()
    timeline.add_span(0, 50 * MS)
    timeline.add_parts(push_ms=20.0, server_optimizer_ms=30.0)
    timeline.add_parts(push_ms=5.0)  # a second optimizer in the same step
    step = timeline.take_step()
    assert step is not None
    assert (step.total_ms, step.push_ms, step.server_optimizer_ms, step.pull_ms) == (20, 25, 30, None)


def test_waiting_in_the_optimizers_step_is_exposed_too_and_told_apart() -> None:
    timeline = Timeline()
    timeline.waited_in_optimizer_step(0, 30 * MS)
    timeline.waited_in_optimizer_step(40 * MS, 50 * MS)
    step = timeline.take_step()
    assert step is not None
    assert (step.exposed_ms, step.exposed_in_optimizer_ms, step.total_ms) == (40, 40, 0)
    timeline.add_span(0, MS)
    step = timeline.take_step()
    assert step is not None
    assert step.exposed_in_optimizer_ms == 0


def test_total_never_becomes_negative() -> None:
    timeline = Timeline()
    timeline.add_span(0, 10 * MS)
    timeline.add_parts(server_optimizer_ms=30.0)
    step = timeline.take_step()
    assert step is not None
    assert step.total_ms == pytest.approx(0)
