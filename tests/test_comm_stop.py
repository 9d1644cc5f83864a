"""All ranks stop after the same step, whoever asks and whenever."""

from __future__ import annotations

import random
import signal

import pytest
import torch.distributed as dist

from gradsync.comm.stop import StopAgreement


def _last_steps(seed: int, ahead: int, margin: int | None) -> list[int]:
    """Of each rank: they end steps in random order, but nobody is more than ``ahead`` steps ahead of another."""
    order = random.Random(seed)
    store = dist.HashStore()
    world_size = order.randint(1, 5)
    ranks = [StopAgreement(store, rank, margin) for rank in range(world_size)]
    ended, last = [0] * world_size, [0] * world_size
    asks_after = order.randint(0, 5 * world_size)
    for turn in range(100 * world_size):
        if turn == asks_after:
            StopAgreement(store, None, None).ask(signal.SIGTERM)
        free = [r for r in range(world_size) if not last[r] and ended[r] - min(ended) < ahead]
        if not free:
            break
        rank = order.choice(free)
        ended[rank] += 1
        if (number := ranks[rank].due(ended[rank])) is not None:
            assert number == signal.SIGTERM
            last[rank] = ended[rank]
    return last


@pytest.mark.parametrize("ahead", [1, 4])
def test_in_a_thousand_orders_all_stop_after_the_same_step(ahead: int) -> None:
    for seed in range(1000):
        last = _last_steps(seed, ahead, margin=ahead)
        assert min(last) > 0, (seed, last)
        assert len(set(last)) == 1, (seed, last)


def test_a_smaller_margin_would_not_do() -> None:
    assert any(len(set(_last_steps(seed, ahead=4, margin=1))) > 1 for seed in range(1000))


def test_ranks_with_paces_of_their_own_stop_at_their_next_step() -> None:
    store = dist.HashStore()
    fast, slow = StopAgreement(store, 0, None), StopAgreement(store, 1, None)
    assert fast.due(90) is None
    assert slow.due(3) is None
    slow.ask(signal.SIGINT)
    assert fast.due(91) == signal.SIGINT
    assert slow.due(4) == signal.SIGINT
    assert slow.decided() == signal.SIGINT
