"""What the trial of the ranks says about the backend."""

from __future__ import annotations

from .check import MIB, RESNET50_BYTES, Check, plural
from .measurements import LARGE_BYTES
from .planned_run import PlannedRun
from .ranks import Outcome

_SLOW_LATENCY_MS, _SLOW_MIB_PER_S = 5.0, 100.0
_UNEVEN = 3.0
"""How much slower one pair of ranks may be than the fastest one."""


def communication_checks(run: PlannedRun, outcome: Outcome, where: str) -> list[Check]:
    """The first one says whether there was a process group; only then follow the others. ``where``: who started it."""
    if not outcome.is_complete():
        return [Check("ranks", "FAIL", *_failure(run, outcome))]
    seconds = max(result["form_s"] for result in outcome.results.values())
    found = f"{plural(outcome.world_size, 'rank')} formed a {run.backend} group {where}, in {seconds:.2f} s"
    values = {"ranks": outcome.world_size, "backend": run.backend, "form_s": seconds}
    checks = [Check("ranks", "ok", found, values=values)]
    if outcome.world_size > 1:
        checks += [_all_reduce(outcome), *_pairs(outcome), *_sharing(outcome)]
    return checks


def _failure(run: PlannedRun, outcome: Outcome) -> tuple[str, str]:
    """What happened, naming the rank, and what to change."""
    if failure := outcome.first_failure():
        at = outcome.step(failure.rank)
        found = f"rank {failure.rank}, at {at}: {' '.join(failure.text.split())[:300]}"
        other = "" if run.backend == "gloo" else "; --accelerator cpu tries gloo; NCCL_DEBUG=INFO says more"
        return found, f"mend what else is marked here first (interfaces, versions){other}"
    late = outcome.missing()
    waiting = f"{run.backend} did not get on within {run.timeout_s:g} s"
    if not late:
        step = outcome.step(0)
        return f"{waiting}: all ranks are at {step}", "a firewall, or another interface: GLOO_SOCKET_IFNAME=lo"
    told = ", ".join(f"rank {rank} at {outcome.step(rank)}{_stopped(outcome, rank)}" for rank in late)
    return f"{waiting}, waiting for {told}", "end what stops or slows that process; slow machine: --timeout SECONDS"


def _stopped(outcome: Outcome, rank: int) -> str:
    return " (stopped by a signal)" if rank in outcome.stopped else ""


def _all_reduce(outcome: Outcome) -> Check:
    latency_ms = 1e3 * max(result["all_reduce_s"] for result in outcome.results.values())
    seconds = max(result["all_reduce_large_s"] for result in outcome.results.values())
    mib_per_s = LARGE_BYTES / MIB / seconds
    gradients_ms = 1e3 * seconds * RESNET50_BYTES / LARGE_BYTES
    found = (
        f"{latency_ms:.3f} ms for 1 float, {mib_per_s:.0f} MiB/s for 64 MiB: "
        f"ResNet50's gradients ({RESNET50_BYTES / MIB:.1f} MiB) in {gradients_ms:.0f} ms"
    )
    values = {"latency_ms": latency_ms, "mib_per_s": mib_per_s, "resnet50_gradients_ms": gradients_ms}
    if latency_ms > _SLOW_LATENCY_MS or mib_per_s < _SLOW_MIB_PER_S:
        remedy = "end what else runs (`top`), see cores and interfaces above; fewer bytes: docs/algorithms.md"
        return Check("all-reduce", "warn", f"{found}: slow", remedy, values)
    return Check("all-reduce", "ok", found, values=values)


def _pairs(outcome: Outcome) -> list[Check]:
    """Of the pairs that ranks of this process began."""
    pairs = {name: times for result in outcome.results.values() for name, times in result["pairs"].items()}
    if not pairs:
        return []
    latencies = {name: 1e6 * latency for name, (latency, _) in pairs.items()}
    speeds = {name: rate / MIB for name, (_, rate) in pairs.items()}
    slowest, fastest = (choose(speeds, key=speeds.__getitem__) for choose in (min, max))
    values = {name: {"latency_us": latencies[name], "mib_per_s": speeds[name]} for name in pairs}
    speed = f"{latencies[slowest]:.0f} us, {speeds[slowest]:.0f} MiB/s one way"
    found = f"ranks {slowest}: {speed}"
    if len(pairs) > 1:
        found = f"slowest of {len(pairs)}: ranks {slowest}, {speed}; fastest: {fastest}, {speeds[fastest]:.0f} MiB/s"
    if speeds[slowest] * _UNEVEN < speeds[fastest]:
        remedy = f"ranks {slowest} slow down all others: see topology, and what else runs on their cores (`top`)"
        return [Check("pairs", "warn", found, remedy, values)]
    return [Check("pairs", "ok", found, values=values)]


def _sharing(outcome: Outcome) -> list[Check]:
    """Whether gradients can be summed in memory that the ranks map together."""
    results = [result for result in outcome.results.values() if "obstacle_to_sharing" in result]
    if not results:
        return []
    obstacle = results[0]["obstacle_to_sharing"]
    values = {"obstacle": obstacle}
    if obstacle:
        remedy = "--trainer.strategy.algorithm native needs none; faster is one container for all ranks, with memory"
        return [Check("shared memory", "warn", obstacle, remedy, values)]
    needed = f"{outcome.world_size} x {RESNET50_BYTES / MIB:.1f} MiB"
    return [Check("shared memory", "ok", f"all ranks map it; room for {needed} of gradients", values=values)]
