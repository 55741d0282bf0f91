"""Requests are made ready out of turn, and no more of them than there is room for."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mllama_jax.batch.feeder import Feeder


def make_feeder(
    items: Any, prepare: Callable[[int], Any], **changes: Any
) -> Iterator[Feeder[int, Any]]:
    options = {"num_workers": 2, "ahead": 8, "size": lambda item: 0, "room": 1, **changes}
    feeder: Feeder[int, Any] = Feeder(items, prepare, **options)
    yield feeder
    feeder.close()


@pytest.fixture
def feeders() -> Iterator[Callable[..., Feeder[int, Any]]]:
    made = []

    def make(*args: Any, **changes: Any) -> Feeder[int, Any]:
        made.append(make_feeder(*args, **changes))
        return next(made[-1])

    yield make
    for feeder in made:
        next(feeder, None)


def taken(feeder: Feeder[int, Any]) -> list[Any]:
    found = []
    while (item := feeder.take(wait=True)) is not None:
        found.append(item)
    assert feeder.is_empty
    return found


def test_what_takes_long_holds_nothing_else_up(feeders):
    let = threading.Event()

    def prepare(item: int) -> int:
        if item == 0:
            assert let.wait(30)
        return item

    feeder = feeders(range(1000), prepare)
    found = [feeder.take(wait=True) for _ in range(999)]
    assert sorted(found) == list(range(1, 1000))
    assert not feeder.is_empty
    assert feeder.take(wait=False) is None
    let.set()
    assert taken(feeder) == [0]


def test_no_more_is_read_than_may_be_ahead(feeders):
    read = []

    def items() -> Iterator[int]:
        for i in range(50):
            read.append(i)
            yield i

    feeder = feeders(items(), lambda item: item, ahead=5)
    for count in range(1, 51):
        assert feeder.take(wait=True) is not None
        assert len(read) <= count + 5


@pytest.mark.parametrize("room", [1, 100, 250])
def test_what_is_ready_holds_no_more_than_there_is_room_for(feeders, room):
    """Beside what the threads are at: a hundred bytes each."""
    lock = threading.Lock()
    held = most = 0

    def prepare(item: int) -> bytes:
        nonlocal held, most
        with lock:
            held += 100
            most = max(most, held)
        return bytes(100)

    feeder = feeders(
        range(40), prepare, size=lambda item: 0 if isinstance(item, int) else 100, room=room
    )
    count = 0
    while feeder.take(wait=True) is not None:
        count += 1
        with lock:
            held -= 100
    assert count == 40
    # One more than fits, one for each further thread, and the one that was just taken.
    assert most <= room + 100 + 100 + 100


def test_large_items_are_not_even_read(feeders):
    read = []

    def items() -> Iterator[int]:
        for i in range(9):
            read.append(i)
            yield i

    feeder = feeders(items(), lambda item: None or item, size=lambda item: 10, room=15)
    for count in range(1, 10):
        assert feeder.take(wait=True) is not None
        assert len(read) <= count + 2


def test_closing_wakes_threads_that_wait_for_room():
    feeder: Feeder[int, int] = Feeder(
        range(9), lambda item: item, num_workers=2, ahead=9, size=lambda item: 10, room=11
    )
    assert feeder.take(wait=True) is not None
    feeder.close()
    feeder._pool.shutdown(wait=True)
    assert not [t for t in threading.enumerate() if t in feeder._pool._threads]


def test_what_must_not_happen_is_not_lost(feeders):
    feeder = feeders(range(3), lambda item: 1 // item)
    found = []
    for _ in range(3):
        try:
            found.append(feeder.take(wait=True))
        except ZeroDivisionError:
            found.append("error")
    assert sorted(map(str, found)) == ["0", "1", "error"]
    assert taken(feeder) == []
