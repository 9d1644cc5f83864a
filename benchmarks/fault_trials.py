"""Trials of `faults.py` in which a process dies, stops, raises, hears a signal, or does not fit the others."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fault_columns import Job
from fault_findings import STEP_TIMEOUT_S, Bench, Findings, NotRun, Row
from fault_process import Step

_ENDLESS = Job(num_epochs=None, steps_per_epoch=1000, pace_s=0.005)
_OTHER_MODEL = "different models|another model|same model|sizes"
_CODES = {"SIGTERM": 143, "SIGINT": 130}


def names_rank(output: str, rank: int) -> bool:
    """Whether it says of this rank, by its number, that it has died or is silent."""
    what = "killed|SIGKILL|died|ended|gone|lost|did not|silent|no answer|not respond"
    return bool(re.search(rf"(?:rank|worker|process)(?:\(?s\)?)? {rank}\b[^\n]{{0,80}}(?:{what})", output))


def killed(bench: Bench, case: str) -> Findings:
    """R1."""
    found, rank = Findings(), int(case[-1])
    with bench.run(Job(fault="kill", rank=rank)) as run:
        run.fault_at()
        found.ended(run.end(), bound_s=3)
        found.should("names the dead rank", names_rank(run.output, rank))
        found.left_nothing(run)
    return found


def stopped(bench: Bench, case: str) -> Findings:
    """R4: out at the limit of a step, and a little for finding out who it was."""
    found = Findings()
    with bench.run(Job(fault="stop", timeout_s=STEP_TIMEOUT_S)) as run:
        run.fault_at()
        found.ended(run.end(), bound_s=STEP_TIMEOUT_S + 5)
        found.should("names the silent rank", names_rank(run.output, 1))
        found.left_nothing(run)
    return found


def raised(bench: Bench, case: str) -> Findings:
    """R7."""
    found = Findings()
    with bench.run(Job(fault="raise")) as run:
        run.fault_at()
        found.ended(run.end(), bound_s=3)
        tracebacks = run.output.count("Traceback (most recent call last)")
        found.should("first error shown", "ArithmeticError: boom in training" in run.output)
        found.at_most("tracebacks", tracebacks, 1)
        found.left_nothing(run)
    return found


# -- signals -------------------------------------------------------------------------------------------------

_SIGNALS = [
    *("SIGTERM to command", "SIGINT to group", "SIGTERM to rank 1", "SIGINT to command"),
    *("SIGTERM to group", "SIGTERM to rank 0", "SIGINT to rank 1", "SIGINT to rank 0"),
]
"""In an order in which few trials show much."""


def signalled(bench: Bench, case: str) -> Findings:
    """R8."""
    found, (name, target) = Findings(), case.split(" to ")
    ranks = [bench.column.first_process + rank for rank in (0, 1)]
    with bench.run(_ENDLESS) as run:
        run.reach(lambda: all(len(run.steps(rank)) > 5 for rank in ranks), "its first steps")
        time.sleep(int.from_bytes(os.urandom(1)) / 1000)  # at any moment of a step
        at = time.monotonic()
        run.send(signal.Signals[name], target, bench.column.first_process)
        ending = run.end(at)
        found.ended(ending, bound_s=5, fails=None)
        found.should("code 143 or 130", ending.code == _CODES[name] and not ending.hung)
        last = _checkpoint(bench.log.parent)
        done = {run.steps(rank)[-1].number + 1 for rank in ranks}
        found.should("checkpoint at a common step", last is not None and done == {last["global_step"]})
        found.left_nothing(run)
    return found


def _checkpoint(folder: Path) -> dict[str, Any] | None:
    path = folder / "run" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True) if path.is_file() else None


# -- the start -----------------------------------------------------------------------------------------------


def models_differ(bench: Bench, case: str) -> Findings:
    """R13: from the moment in which the last rank has its model."""
    found = Findings()
    with bench.run(Job(fault="differs")) as run:
        found.ended(run.end(), bound_s=2)
        found.should("refused before the first step", not run.steps(bench.column.first_process))
        says = [line for line in run.output.splitlines() if re.search(_OTHER_MODEL, line)]
        speakers = len([line for line in says if re.search(r"[Ee]rror", line)])
        found.saw("times said", speakers)
        found.should("names the tensor", any("second.weight" in line for line in says))
        found.left_nothing(run)
    return found


def port_taken(bench: Bench, case: str) -> Findings:
    """R16: a foreign program listens at the port where ranks are to meet, and answers nothing."""
    found = Findings()
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = str(foreign.getsockname()[1])
        with bench.run(
            Job(fault="tell_start", rank=-bench.column.first_process), environment={"MASTER_PORT": port}
        ) as run:
            run.fault_at()
            found.ended(run.end(), bound_s=3)
            lines = [line for line in run.output.splitlines() if port in line]
            found.should("says that the port is taken", any(re.search("taken|in use|EADDRINUSE", li) for li in lines))
            found.at_most("tracebacks", run.output.count("Traceback (most recent call last)"), 0)
            found.left_nothing(run)
    return found


# -- restarts ------------------------------------------------------------------------------------------------


_PER_EPOCH = 5
_FAILS_AT = 13
_TO_RESTART = Job(fault="kill", at_step=_FAILS_AT, num_epochs=4, steps_per_epoch=_PER_EPOCH)


def restarted(bench: Bench, case: str) -> Findings:
    """R18: torchrun starts both ranks again after one was killed."""
    job = replace(_TO_RESTART, rank=int(case[-1]), resume=True, under_torchrun=True)
    return _started_again(bench, job, bound_s=30)


def killed_and_restarted(bench: Bench, case: str) -> Findings:
    """R2."""
    return _by_gradsync(bench, replace(_TO_RESTART, rank=int(case[-1])), bound_s=30)


def server_killed_and_restarted(bench: Bench, case: str) -> Findings:
    """R3."""
    if not bench.column.first_process:
        raise NotRun("there is no server")
    options = ("--trainer.strategy.mode", case)
    return _by_gradsync(bench, replace(_TO_RESTART, fault="kill_parent", options=options), bound_s=15)


def _by_gradsync(bench: Bench, job: Job, bound_s: float) -> Findings:
    if not bench.column.is_ours:
        raise NotRun("nothing starts it again")
    own = ("--max_restarts", "1", "--snapshot_every_n_steps", "4")
    return _started_again(bench, replace(job, options=(*job.options, *own)), bound_s)


def _started_again(bench: Bench, job: Job, bound_s: float) -> Findings:
    """Trains again so long after the fault."""
    found = Findings()
    with bench.run(job) as run:
        failed_at = run.fault_at()
        ending = run.end(limit_s=120)
        found.ended(ending, fails=False)
        attempts = _attempts(run.steps(bench.column.first_process))
        found.should("trains again", len(attempts) == 2)
        if len(attempts) == 2:
            begins = attempts[1][0]
            found.should("goes on from the checkpoint", begins.number > 0)
            found.at_most("steps lost", attempts[0][-1].number - begins.number, _PER_EPOCH)
            found.quickly("gap", begins.at - failed_at, bound_s, ending.was_busy)
        found.left_nothing(run)
    return found


def _attempts(steps: list[Step]) -> list[list[Step]]:
    pids = list(dict.fromkeys(step.pid for step in steps))
    return [[step for step in steps if step.pid == pid] for pid in pids]


PROCESS_ROWS = {
    "R1": Row("SIGKILL of a rank", ("rank 1", "rank 0"), killed),
    "R2": Row("SIGKILL of a rank, `--max_restarts 1`", ("rank 1", "rank 0"), killed_and_restarted),
    "R3": Row("SIGKILL of the server, `--max_restarts 1`", ("sync", "async"), server_killed_and_restarted),
    "R4": Row("SIGSTOP of a rank; a step may take 10 s", ("",), stopped),
    "R7": Row("exception in one rank", ("",), raised),
    "R8": Row("SIGTERM or Ctrl-C to the command, the group or one rank", _SIGNALS, signalled, takes_turns=True),
    "R13": Row("models differ between ranks", ("",), models_differ),
    "R16": Row("the port is taken", ("",), port_taken),
    "R18": Row("SIGKILL of a rank under `torchrun --max-restarts`", ("rank 1", "rank 0"), restarted, takes_turns=True),
}
