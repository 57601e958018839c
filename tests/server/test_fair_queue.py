"""Clients take turns; nobody is lost, doubled or overtaken by requests of one's own."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity.server.fair_queue import FairQueue

CLIENTS = st.integers(0, 3)


def filled(clients: list[int]) -> FairQueue[tuple[int, int]]:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for number, client in enumerate(clients):
        queue.put(client, (client, number))
    return queue


def test_one_with_few_does_not_wait_behind_one_with_many() -> None:
    queue = filled([1, 1, 1, 1, 2, 3, 2])
    assert [queue.take()[0] for _ in range(7)] == [1, 2, 3, 1, 2, 1, 1]
    with pytest.raises(IndexError, match="empty"):
        queue.take()


def test_a_client_that_comes_again_is_last() -> None:
    queue = filled([1, 2])
    assert queue.take() == (1, 0)
    queue.put(1, (1, 9))
    assert [queue.take() for _ in range(2)] == [(2, 1), (1, 9)]


@given(st.lists(st.one_of(CLIENTS, st.just("take"), st.just("remove")), max_size=60))
def test_whatever_happens(steps: list[int | str]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    waiting: list[tuple[int, int]] = []
    for number, step in enumerate(steps):
        if step == "take":
            if waiting:
                taken = queue.take()
                own = [item for item in waiting if item[0] == taken[0]]
                assert taken == own[0]
                waiting.remove(taken)
        elif step == "remove":
            item = waiting[number % len(waiting)] if waiting else (9, 9)
            assert queue.remove(item) == (item in waiting)
            assert not queue.remove(item)
            waiting = [other for other in waiting if other != item]
        else:
            assert isinstance(step, int)
            queue.put(step, (step, number))
            waiting.append((step, number))
        assert len(queue) == len(waiting)
    assert sorted(queue.drain()) == sorted(waiting)
    assert len(queue) == 0


@given(st.lists(CLIENTS, max_size=40))
def test_none_waits_longer_than_a_round(clients: list[int]) -> None:
    """Between two turns of a client each other one has at most one."""
    queue = filled(clients)
    turns = [queue.take()[0] for _ in clients]
    for client in set(clients):
        own = [at for at, turn in enumerate(turns) if turn == client]
        for before, after in itertools.pairwise(own):
            between = turns[before + 1 : after]
            assert len(between) == len(set(between))
