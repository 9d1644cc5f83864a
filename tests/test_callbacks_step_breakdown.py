from __future__ import annotations

import json
import time

import pytest

from gradsync.callbacks import StepBreakdown
from gradsync.callbacks.step_breakdown import RunningMean, break_down
from gradsync.callbacks.step_timer import PHASES, Phase, StepTimer
from gradsync.comm.timeline import StepCommunication

PHASES_MS: dict[Phase, float] = {"data": 4.0, "compute": 71.0, "optimizer": 30.0, "other": 2.0}


def parts_ms(step: StepBreakdown) -> list[float]:
    return [step.data_ms, step.compute_ms, step.exposed_ms, step.optimizer_ms, step.other_ms]


def test_phases_add_up_to_the_time_between_first_and_last_call() -> None:
    timer = StepTimer()
    before = time.perf_counter()
    for phase in (*PHASES, *PHASES):
        timer.enter(phase)
        time.sleep(0.002)
    spent_ms = timer.take_ms()
    wall_ms = 1000 * (time.perf_counter() - before)
    assert all(spent_ms[phase] >= 4.0 for phase in PHASES)
    assert sum(spent_ms.values()) <= wall_ms


def test_paused_time_counts_for_nobody() -> None:
    timer = StepTimer()
    before = time.perf_counter()
    timer.enter("compute")
    timer.pause()
    time.sleep(0.05)
    timer.enter("data")
    timer.pause()
    spent_ms = timer.take_ms()
    wall_ms = 1000 * (time.perf_counter() - before)
    assert min(spent_ms["compute"], spent_ms["data"]) > 0.0
    assert sum(spent_ms.values()) <= wall_ms - 50.0


def test_taking_starts_over_and_the_running_phase_goes_on() -> None:
    timer = StepTimer()
    timer.enter("data")
    assert timer.take_ms()["data"] > 0.0
    assert timer.take_ms()["data"] > 0.0
    timer.pause()
    timer.take_ms()
    assert sum(timer.take_ms().values()) == 0.0


@pytest.mark.parametrize("in_optimizer_step", [False, True])
@pytest.mark.parametrize("in_own_step_pct", [0, 50, 100])
@pytest.mark.parametrize("exposed_ms", [0.0, 20.0, 72.0, 500.0])
@pytest.mark.parametrize("server_optimizer_ms", [None, 5.0, 500.0])
def test_parts_add_up_to_the_step_and_none_is_negative(
    in_optimizer_step: bool, exposed_ms: float, server_optimizer_ms: float | None, in_own_step_pct: int
) -> None:
    comm = StepCommunication(
        600.0,
        exposed_ms,
        8,
        server_optimizer_ms=server_optimizer_ms,
        exposed_in_optimizer_ms=exposed_ms * in_own_step_pct / 100,
    )
    step = break_down(PHASES_MS, comm, in_optimizer_step=in_optimizer_step)
    assert step.step_ms == sum(PHASES_MS.values())
    assert sum(parts_ms(step)) == pytest.approx(step.step_ms)
    assert min(parts_ms(step)) >= 0.0


def test_exposed_communication_is_taken_from_compute() -> None:
    step = break_down(PHASES_MS, StepCommunication(30.0, 20.0, 8), num_images=214)
    assert parts_ms(step) == [4.0, 51.0, 20.0, 30.0, 2.0]
    assert (step.overlapped_ms, step.num_bytes) == (10.0, 8)
    assert step.share_pct == pytest.approx(100 * 20 / 107)
    assert step.images_per_s == pytest.approx(2000)


def test_what_ranks_that_step_themselves_wait_for_there_is_taken_from_the_optimizer() -> None:
    step = break_down(PHASES_MS, StepCommunication(30.0, 20.0, 8, exposed_in_optimizer_ms=12.0))
    assert parts_ms(step) == [4.0, 71.0 - 8.0, 20.0, 30.0 - 12.0, 2.0]


def test_a_server_that_steps_inside_the_optimizer_step_is_the_optimizer() -> None:
    comm = StepCommunication(20.0, 20.0, 8, push_ms=8.0, pull_ms=9.0, wait_ms=3.0, server_optimizer_ms=6.0)
    step = break_down(PHASES_MS, comm, in_optimizer_step=True)
    assert parts_ms(step) == [4.0, 71.0, 20.0, 6.0, 2.0 + (30.0 - 20.0 - 6.0)]
    assert (step.push_ms, step.pull_ms, step.wait_ms) == (8.0, 9.0, 3.0)


def test_without_communication_all_its_figures_are_zero() -> None:
    step = break_down(PHASES_MS, None)
    assert (step.exposed_ms, step.total_ms, step.overlapped_ms, step.num_bytes, step.share_pct) == (0, 0, 0, 0, 0)
    assert step.compute_ms == PHASES_MS["compute"]
    assert not {"comm/push_ms", "comm/pull_ms", "comm/wait_ms"} & step.metrics().keys()


def steps(count: int) -> list[StepBreakdown]:
    return [
        break_down({p: float(i + k) for k, p in enumerate(PHASES)}, StepCommunication(i, i / 2, i, push_ms=i))
        for i in range(1, count + 1)
    ]


def test_running_mean_is_the_mean_and_keeps_the_law() -> None:
    running, many = RunningMean(), steps(7)
    for step in many:
        running.add(step)
    mean = running.mean()
    assert mean is not None
    assert mean.num_steps == running.num_measured == 7
    assert mean.step_ms == pytest.approx(sum(s.step_ms for s in many) / 7)
    assert mean.push_ms == pytest.approx(sum(s.push_ms or 0 for s in many) / 7)
    assert sum(parts_ms(mean)) == pytest.approx(mean.step_ms)
    assert running.wall_ms == pytest.approx(sum(s.step_ms for s in many))


def test_warmup_counts_only_where_there_is_nothing_else() -> None:
    running, (first, second, third) = RunningMean(), steps(3)
    assert running.mean() is None
    running.add(first, warmup=True)
    assert running.mean() == first
    assert running.num_measured == 0
    running.add(second)
    running.add(third, warmup=True)
    assert running.mean() == second
    assert running.wall_ms == pytest.approx(first.step_ms + second.step_ms + third.step_ms)


def test_means_of_means_are_weighted_by_their_steps() -> None:
    parts, whole, (a, b, c) = RunningMean(), RunningMean(), steps(3)
    pair = RunningMean()
    for step in (a, b):
        pair.add(step)
    pair_mean = pair.mean()
    assert pair_mean is not None
    parts.add(pair_mean)
    parts.add(c)
    for step in (a, b, c):
        whole.add(step)
    assert parts.mean() == whole.mean()


def test_state_survives_json() -> None:
    running, again = RunningMean(), RunningMean()
    for i, step in enumerate(steps(4)):
        running.add(step, warmup=i == 0)
    again.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert again.mean() == running.mean()
    assert again.wall_ms == running.wall_ms
