"""A worker's side of several servers: one step goes to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from ..timeline import Timeline
from .client import WorkerClient, step_together
from .growth import Joining
from .shards import Cut, Piece, cut_state, join_states

Named = list[tuple[str, Tensor]]


def pieces_of(named_parameters: list[Named], cuts: list[list[list[Cut]]], server: int) -> list[list[Piece]]:
    """Per optimizer, what ``server`` serves. ``cuts``: per optimizer and server."""
    return [
        [Piece(named[cut.index][1], cut) for cut in own[server]]
        for named, own in zip(named_parameters, cuts, strict=True)
    ]


def name_pieces(named_parameters: list[Named], pieces: list[list[Piece]]) -> list[Named]:
    """Names and tensors of ``pieces``, as a server and its clients know them."""
    return [
        [(piece.cut.name(named[piece.cut.index][0], piece.parameter), piece.tensor) for piece in own]
        for named, own in zip(named_parameters, pieces, strict=True)
    ]


@final
class ServersClient:
    """Everything that :class:`.WorkerClient` does, with every server; blocks likewise.

    Args:
        clients: One per server.
        pieces: Per server and optimizer, what that client pushes and pulls.
        cuts: Per optimizer and server, where those lie.
        parameters: Per optimizer, all of them.
        timeline: Where the spans go.
    """

    def __init__(
        self,
        clients: Sequence[WorkerClient],
        pieces: list[list[list[Piece]]],
        cuts: list[list[list[Cut]]],
        parameters: list[list[Tensor]],
        timeline: Timeline,
    ) -> None:
        self._clients = clients
        for number, client in enumerate(clients):
            client.number = number
        self._pieces = pieces
        self._cuts = cuts
        self._parameters = parameters
        self._timeline = timeline

    @property
    def num_updates(self) -> int:
        """Steps of the server that had made most, when they last answered."""
        return max(client.version for client in self._clients)

    @property
    def version(self) -> int:
        """See :class:`.WorkerClient`; those of all servers together."""
        return sum(client.version for client in self._clients)

    def start(self) -> None:
        for client in self._clients:
            client.start()

    def count_samples(self, num_samples: int) -> None:
        """So many more go into the coming push."""
        for client in self._clients:
            client.num_samples = (client.num_samples or 0) + num_samples

    def admit(self, worker: int) -> None:
        """Rank 0: another process takes the place of a lost worker, from the coming step on."""
        for client in self._clients:
            client.admits.append(worker)

    @property
    def num_samples(self) -> int:
        """Those of all pushes, and of the coming one."""
        return self._clients[0].num_samples or 0

    def step(self, number: int, groups: list[dict[str, Any]], clip: dict[str, Any]) -> None:
        """See :meth:`.WorkerClient.step`."""
        self._follow(number)
        step_together(self._clients, number, groups, clip, self._timeline)
        for piece in self._all_pieces(number):
            if not piece.is_whole:
                piece.tensor.grad = None

    def grow(self, number: int, new: list[Tensor], cuts: list[list[Cut]], joinings: list[Joining]) -> None:
        """Phase *grow* with every server.

        Args:
            number: Of the optimizer.
            new: Parameters of its new groups.
            cuts: Per server, what it serves of those.
            joinings: Per server, those and what was unfrozen.
        """
        first = len(self._parameters[number])
        self._parameters[number] += new
        for server, (client, joining) in enumerate(zip(self._clients, joinings, strict=True)):
            self._cuts[number][server] += [replace(cut, index=cut.index + first) for cut in cuts[server]]
            self._pieces[server][number] += [piece for _, rows in joining.groups for _, piece in rows]
            client.grow(number, joining)

    def fetch(self, exact: bool = False) -> None:
        """See :meth:`.WorkerClient.fetch`."""
        for number in range(len(self._parameters)):
            self._follow(number)
        for client in self._clients:
            client.fetch(exact)

    def round(self) -> None:
        """See :meth:`.WorkerClient.round`."""
        for client in self._clients:
            client.round()

    def _all_pieces(self, number: int) -> list[Piece]:
        return [piece for own in self._pieces for piece in own[number]]

    def _follow(self, number: int) -> None:
        for piece in self._all_pieces(number):
            piece.follow()

    def get_state(self, number: int) -> dict[str, Any]:
        """As one optimizer over all parameters would have it."""
        states = [client.get_state(number) for client in self._clients]
        joined = join_states([s["state"] for s in states], self._cuts[number], self._parameters[number])
        return {"state": joined, "param_groups": states[0]["param_groups"]}

    def set_state(self, number: int, state: dict[str, Any]) -> None:
        for client, own in zip(self._clients, self._cuts[number], strict=True):
            cut = cut_state(state["state"], own, self._parameters[number])
            client.set_state(number, {**state, "state": cut})

    def bye(self, info: Any = None, tree: Any = None) -> None:
        """``tree`` goes to the first server, ``info`` to all."""
        for number, client in enumerate(self._clients):
            client.bye(info, tree if number == 0 else {})

    def release(self) -> None:
        """See :meth:`.WorkerClient.release`."""
        for client in self._clients:
            client.release()

    def fail(self, error: str) -> None:
        for client in self._clients:
            client.fail(error)
