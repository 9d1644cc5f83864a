"""A worker's side of phase *grow*: what has become trainable or was added since the last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from ..optimizers import is_elementwise
from .growth import Joining
from .servers_client import ServersClient
from .shards import Cut, Piece, spread


@final
class WorkerGrowth:
    """Tells the servers of parameters and groups that have joined an optimizer; every worker must.

    What was unfrozen is served by the first server, which has it already; new groups are spread over all of them.

    Args:
        client: Connected.
        optimizers: As configured, with the groups that the servers know.
        named_parameters: Of the module.
        num_servers: Of the run.
        may_cut: Whether parameters may be cut, if the optimizer is elementwise.
    """

    def __init__(
        self,
        client: ServersClient,
        optimizers: list[Optimizer],
        named_parameters: Iterable[tuple[str, Tensor]],
        num_servers: int,
        may_cut: bool = True,
    ) -> None:
        self._client = client
        self._names = {p: name for name, p in named_parameters}
        self._num_servers = num_servers
        self._may_cut = [may_cut and is_elementwise(optimizer) for optimizer in optimizers]
        self._groups = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        self._trained = [{p for group in groups for p in group if p.requires_grad} for groups in self._groups]

    def follow(self, number: int, groups: list[dict[str, Any]], settings: list[dict[str, Any]]) -> None:
        """Let the servers know ``groups`` of optimizer ``number``; returns when they do. Cheap if nothing has joined.

        Args:
            number: Of the optimizer.
            groups: Its parameter groups now.
            settings: Those without parameters, JSON-compatible.

        Raises:
            ValueError: a group that was there has other parameters now, or the module lacks one that has joined.
        """
        known = self._groups[number]
        present = [list(group["params"]) for group in groups]
        if not _same(present[: len(known)], known):
            raise ValueError(
                "a parameter group has other parameters than before: the parameter server takes new ones in a group of "
                "their own only (optimizer.add_param_group)"
            )
        added = present[len(known) :]
        joined = [p for group in known for p in group if p.requires_grad and p not in self._trained[number]]
        if joined or added:
            self._grow(number, joined, added, settings[len(known) :])
            known += added
            self._trained[number].update(joined, (p for group in added for p in group if p.requires_grad))

    def _grow(self, number: int, joined: list[Tensor], added: list[list[Tensor]], settings: list[Any]) -> None:
        of_group = [index for index, group in enumerate(added) for _ in group]
        new = [p for group in added for p in group]
        cuts = spread(new, self._num_servers, self._may_cut[number])
        joinings = []
        for server, own in enumerate(cuts):
            rows: list[list[tuple[str, Piece]]] = [[] for _ in added]
            for cut in own:
                rows[of_group[cut.index]].append((self._name(new[cut.index]), Piece(new[cut.index], cut)))
            unfrozen = [(self._name(p), Piece(p, Cut(0, 0, p.numel()))) for p in joined] if server == 0 else []
            joinings.append(Joining(unfrozen, list(zip(settings, rows, strict=True))))
        self._client.grow(number, new, cuts, joinings)

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            raise ValueError("a parameter that is not the module's has joined an optimizer in mid-run")
        return self._names[parameter]


def _same(groups: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
    return list(map(len, groups)) == list(map(len, others)) and all(
        p is other for group, known in zip(groups, others, strict=True) for p, other in zip(group, known, strict=True)
    )
