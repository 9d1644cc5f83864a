"""Training between two hosts over a link of limited rate: images/s by strategy, as ratios to Lightning's DDP.

    python benchmarks/two_hosts.py --mbit 100

Hosts are namespaces of this machine (see `tests/namespaces.py`), so it needs root, and a checkout. Every strategy has
two processes on each host; the parameter server's first one serves, so it trains in 3 and the others in 4. The network
is one layer of `--mib` and next to no computation: what differs is how much goes over the link, and who waits for it.
Compare rows by images/s of one training process, which is what the ratio is of. Time is that of the slowest one: in
async mode the others have ended before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

PER_HOST, BATCH_SIZE, PORT = 2, 16, 29400
STRATEGIES = ("ddp", "manual_allreduce", "sharded_server", "parameter_server", "parameter_server_async")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100, help="rate of the link, in Mbit/s (%(default)s)")
    parser.add_argument("--mib", type=float, default=1, help="size of the network, in MiB (%(default)s)")
    parser.add_argument("--steps", type=harness.positive_int, default=20, help="steps timed per turn (%(default)s)")
    parser.add_argument("--warmup", type=harness.positive_int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--rounds", type=harness.positive_int, default=3, help="turns of every row (%(default)s)")
    names = harness.names_out_of(STRATEGIES)
    parser.add_argument("--strategies", type=names, default=list(STRATEGIES), help="(all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    arguments = parser.parse_args()
    if arguments.mbit <= 0 or arguments.mib <= 0:
        parser.error("arguments --mbit and --mib: must be > 0")
    return arguments


def _make_strategy(name: str, folder: Path) -> Any:
    from namespaces import ADDRESSES

    import gradsync

    if name == "ddp":
        return "ddp"
    if not name.startswith("parameter_server"):
        return gradsync.STRATEGIES[name]()
    options = {"transport": "tcp", "host": ADDRESSES[0], "keys": folder / "keys", "server_log_every_n_steps": 0}
    return gradsync.ParameterServerStrategy(**options, mode="async" if name.endswith("async") else "sync")


def _train(rank: int, name: str, folder: Path, given: argparse.Namespace) -> float | None:
    """Seconds per step on a training process, None on a server."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from training import make_trainer, quiet

    class Layer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(256, max(1, int(given.mib * 2**20 / 4 / 257)))
            self.started = self.ended = 0.0

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index == given.warmup:
                self.started = time.monotonic()
            return self.layer(batch[0]).square().mean()

        def on_train_batch_end(self, *_: Any) -> None:
            self.ended = time.monotonic()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    quiet()
    num_steps = given.warmup + given.steps
    trainer = make_trainer(_make_strategy(name, folder), PER_HOST, num_nodes=2, max_steps=num_steps)
    module = Layer()
    loader = DataLoader(TensorDataset(torch.randn(num_steps * 4 * BATCH_SIZE, 256)), BATCH_SIZE)
    trainer.fit(module, loader)
    return (module.ended - module.started) / given.steps if module.started else None


def measure(hosts: Any, name: str, folder: Path, given: argparse.Namespace) -> harness.Metrics:
    """All processes of one training. Raises: RowFailed."""
    from distributed import run_ranks
    from namespaces import ADDRESSES, INTERFACE

    def enter(rank: int) -> dict[str, str]:
        host, local_rank = divmod(rank, PER_HOST)
        hosts.enter(host)
        address = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
        return {**address, "NODE_RANK": str(host), "LOCAL_RANK": str(local_rank)}

    ranks = run_ranks(_train, 2 * PER_HOST, name, folder, given, timeout_s=600, enter=enter)
    for number, rank in enumerate(ranks):
        if rank.code != 0:
            raise harness.RowFailed(f"process {number} ended with exit code {rank.code}\n{rank.output[-2000:]}")
    steps_s = [rank.result for rank in ranks if rank.result is not None]
    each = BATCH_SIZE / max(steps_s)
    return {"images_per_s_each": each, "images_per_s": each * len(steps_s), "trained_in": float(len(steps_s))}


def main() -> int:
    given = parse_arguments()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import lightning.pytorch  # noqa: F401 (ranks are forked from this process)
    import pytest
    from namespaces import two_hosts

    from gradsync.callbacks import machine_environment
    from gradsync.keys import make_keys

    load_before, stolen = os.getloadavg()[0], harness.StolenTime()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        make_keys(Path(name) / "keys")
        try:
            hosts = stack.enter_context(two_hosts())
        except pytest.skip.Exception as reason:
            print(f"two_hosts.py: {reason}", file=sys.stderr)
            return 1
        hosts.limit(given.mbit)
        rows = {row: lambda row=row: measure(hosts, row, Path(name), given) for row in given.strategies}
        rounds = harness.Rounds(rows, "images_per_s_each")
        rounds.run(given.rounds)
    summary = rounds.summary(("ddp",), "images_per_s_each")
    harness.print_table(summary)
    environment = {**machine_environment(), "load_average_before": load_before, "stolen_pct": stolen.pct()}
    return harness.conclude("two_hosts", given, environment, summary, rounds.failed)


if __name__ == "__main__":
    harness.run(main)
