"""Hostile messages against a real parameter server: a million of them, by default.

    python benchmarks/fuzz.py --frames 20000
    nice python benchmarks/fuzz.py --json fuzz.json

A run of two workers is recorded, for a server in `sync`, in `sync` with bfloat16 on the wire, and in `async`. Then a
server is taken through it again, and before every message it gets hostile ones, made of it: cut, too long, with flipped
bits, doubled, replayed, too early, of a wrong dtype, with junk in their text, or random. Most go to the server object
itself. A part (`--socket-share`) goes through a real TCP socket to a server in a process of its own, one message in ten
of those as the bytes of ZeroMQ's own protocol, cut and flipped anywhere, which libzmq has to bear.

What must hold: no crash; no message that takes longer than a second; parameters that are the same to the bit after a
message that was refused; a server that goes on with the conversation; memory that does not grow. The exit code is 1 if
anything else is found. Messages that a well-behaved worker might have sent are taken, and counted as such.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import harness

if TYPE_CHECKING:
    from fuzz_frames import Talk
    from rich.progress import Progress

_NUM_SAMPLES = 100
_PATIENCE_S = 10.0
"""For a message that takes a second at most, on a machine that may be busy."""
_FLAT_KIB = 16 * 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--frames", type=harness.positive_int, default=1_000_000, help="hostile messages in all (%(default)s)")
    add("--socket-share", type=_share, default=0.1, help="part of them that goes through a socket (%(default)s)")
    add("--seed", type=int, default=0, help="another one makes other messages (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    return parser.parse_args()


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


@final
class Memory:
    """Resident memory of a process while it is under fire."""

    def __init__(self, pid: int, total: int) -> None:
        self._path = Path(f"/proc/{pid}/statm")
        self._every = max(1, total // _NUM_SAMPLES)
        self._samples: list[tuple[int, float]] = []

    def look(self, done: int) -> None:
        if done % self._every == 0 and self._path.exists():
            pages = int(self._path.read_text().split()[1])
            self._samples.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 1024))

    def growth(self) -> dict[str, float]:
        """In KiB: at the end, and over the second half by the line through it (the first half fills caches)."""
        late = self._samples[len(self._samples) // 2 :]
        if len(late) < 3:
            return {"rss_kib": late[-1][1] if late else 0.0, "growth_kib": 0.0}
        slope = statistics.linear_regression(*zip(*late, strict=True)).slope
        return {"rss_kib": late[-1][1], "growth_kib": slope * (late[-1][0] - late[0][0])}


@final
class Row:
    """One server's figures."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.outcomes: Counter[str] = Counter()
        self.by_mutation: dict[str, Counter[str]] = {}
        self.faults: Counter[str] = Counter()
        self.longest_s = 0.0
        self.seconds = 0.0
        self.memory: dict[str, float] = {}

    def as_json(self) -> dict[str, Any]:
        counted = {"messages": self.num, "outcomes": dict(self.outcomes), "faults": dict(+self.faults), **self.memory}
        counted["by_mutation"] = {name: dict(outcomes) for name, outcomes in self.by_mutation.items()}
        return {**counted, "longest_ms": self.longest_s * 1e3, "seconds": self.seconds}

    def misses(self) -> str:
        """What should not be, in one line; empty if all is well."""
        found = [f"{what} ({count} times)" for what, count in (+self.faults).items()]
        if self.memory.get("growth_kib", 0.0) > _FLAT_KIB:
            found.append(f"memory grew by {self.memory['growth_kib'] / 1024:.0f} MiB in the second half")
        return "; ".join(found)


def attack_object(kind: str, talk: Talk, num: int, rng: random.Random, tick: Any) -> Row:
    """``num`` messages to the server object, in this process."""
    from fuzz_frames import MUTATIONS, mutate
    from fuzz_server import Victim

    row, victim, memory, names = Row(num), Victim(kind, talk), Memory(os.getpid(), num), list(MUTATIONS)
    row.by_mutation = {name: Counter() for name in names}
    done, at = 0, 0
    while done < num:
        for name in names[: num - done]:
            before = victim.outcomes.copy()
            victim.attack(at, mutate(name, talk, at, rng))
            row.by_mutation[name] += victim.outcomes - before
            done += 1
            memory.look(done)
        victim.go_on(at)
        at = (at + 1) % len(talk)
        if at == 0:
            victim.restart(0)
        tick(done)
    row.outcomes, row.faults, row.longest_s = victim.outcomes, victim.faults, victim.longest_s
    row.memory = memory.growth()
    return row


def attack_socket(kind: str, talk: Talk, num: int, rng: random.Random, tick: Any) -> Row:
    """``num`` messages through TCP, to a server in a process of its own that is in the middle of a step."""
    from fuzz_server import Target
    from fuzz_socket import Attacker

    target = Target(kind, talk, rng.randrange(len(talk) // 2, len(talk) - 3))
    row, memory = Row(num), Memory(target.pid, num)
    attacker = Attacker(target, talk, rng)
    try:
        for done in range(1, num + 1):
            attacker.attack(is_raw=done % 10 == 0)
            if done % 200 == 0 and not attacker.is_answered(_PATIENCE_S):
                row.faults["the server is gone or hangs"] += 1
                break
            memory.look(done)
            tick(done)
        row.faults["the server is gone or hangs"] += not attacker.is_answered(_PATIENCE_S)
    finally:
        attacker.close()
        row.outcomes, faults, row.longest_s = target.end()
    row.outcomes["raw"] = attacker.num_raw
    row.faults += faults
    row.memory = memory.growth()
    return row


def run_all(arguments: argparse.Namespace, progress: Progress) -> dict[str, Row]:
    from fuzz_frames import KINDS, record

    rng = random.Random(arguments.seed)
    through_socket = round(arguments.frames * arguments.socket_share)
    task = progress.add_task("hostile messages", total=arguments.frames)
    rows, begun = {}, 0
    for index, kind in enumerate(KINDS):
        talk = record(kind)
        for total, attack in ((arguments.frames - through_socket, attack_object), (through_socket, attack_socket)):
            num = (total + index) // len(KINDS)
            if num == 0:
                continue
            name = kind if attack is attack_object else f"{kind}, through a socket"
            progress.update(task, description=name)
            start = time.monotonic()
            first = begun
            row = attack(kind, talk, num, rng, lambda done, first=first: progress.update(task, completed=first + done))
            row.seconds = time.monotonic() - start
            rows[name] = row
            begun += num
    return rows


def _print(rows: dict[str, Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("server", "refused", "taken", "raw bytes", "longest ms", "memory grew KiB", "µs each", "misses")
    for name, row in rows.items():
        counts = [f"{row.outcomes[what]:,}" for what in ("refused", "taken", "raw")]
        figures = [
            f"{row.longest_s * 1e3:.1f}",
            f"{row.memory['growth_kib']:.0f}",
            f"{row.seconds / row.num * 1e6:.0f}",
        ]
        table.add_row(name, *counts, *figures, row.misses() or "none")
    Console().print(table)


def main() -> int:
    arguments = parse_arguments()
    print("Loading torch ...", flush=True)
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gradsync.callbacks import machine_environment

    torch.set_num_threads(1)
    environment = {**machine_environment(), "load_average_before": os.getloadavg()[0]}
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        rows = run_all(arguments, progress)
    _print(rows)
    failed = {name: misses for name, row in rows.items() if (misses := row.misses())}
    total = sum((row.outcomes for row in rows.values()), Counter())
    num, seconds = sum(row.num for row in rows.values()), time.monotonic() - start
    print(
        f"{num:,} hostile messages in {seconds:.0f} s, seed {arguments.seed}: "
        f"{total['refused']:,} refused, {total['taken']:,} taken because a worker may send them, "
        f"{total['crashed']} crashes; {'all is well' if not failed else 'see what FAILED'}"
    )
    shown = {name: row.as_json() for name, row in rows.items()}
    return harness.conclude("fuzz", arguments, environment, shown, failed)


if __name__ == "__main__":
    harness.run(main)
