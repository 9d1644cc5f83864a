"""Who is who in a run in which some processes serve and the others train, on one host or several."""

from __future__ import annotations

from abc import ABC

from lightning.fabric.plugins.environments import LightningEnvironment
from typing_extensions import override

from ..errors import UserError
from ..failures import introduce
from .collective import CollectiveStrategy


class ServedWorldStrategy(CollectiveStrategy, ABC):
    """The first ``num_servers`` of all processes serve. Lightning's world is the others: ranks count from the first.

    Servers are on the first host, beside one worker at least, which prepares data there.
    """

    num_servers = 1
    workers_may_be_lost = False

    @property
    def process_rank(self) -> int:
        """Rank among all processes, of which the first are the servers."""
        return self.cluster_environment.global_rank() if self.cluster_environment is not None else 0

    @property
    def num_all(self) -> int:
        """Processes of the run, servers and workers."""
        return self.num_nodes * self.num_processes

    @property
    def name(self) -> str:
        """What messages call this process."""
        return f"server {self.process_rank}" if self.is_server else f"worker {self.global_rank}"

    @property
    def is_server(self) -> bool:
        return self.process_rank < self.num_servers

    @property
    @override
    def world_size(self) -> int:
        return self.num_all - self.num_servers

    @property
    @override
    def global_rank(self) -> int:
        """Rank among the workers. Servers take those after the last: rank-zero work is not their own."""
        return self.process_rank + (self.world_size if self.is_server else -self.num_servers)

    @property
    @override
    def local_rank(self) -> int:
        """Among this host's workers. Servers take those after the last."""
        if self.node_rank > 0:
            return super().local_rank
        return super().local_rank + (self.num_processes if self.is_server else 0) - self.num_servers

    @override
    def set_world_ranks(self) -> None:
        if self.num_processes <= self.num_servers:
            where = " on each host" if self.num_nodes > 1 else ""
            raise UserError(
                f"--trainer.strategy parameter_server needs at least {self.num_servers + 1} processes{where} "
                f"({self.num_servers} server{'s' * (self.num_servers > 1)} and 1 worker): set --trainer.devices "
                f"{self.num_servers + 1} or more, got {self.num_processes}"
            )
        super().set_world_ranks()
        introduce(self.name, may_be_lost=self.workers_may_be_lost and not self.is_server and self.global_rank > 0)

    def servers_to_tell_of(self) -> list[int]:
        """The first worker tells whose end nobody else would: server 0 names its children, torchrun only ranks."""
        external = not isinstance(self.cluster_environment, LightningEnvironment)
        return [s for s in range(self.num_servers) if self.global_rank == 0 and (s == 0 or external)]
