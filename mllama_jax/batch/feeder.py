"""Requests made ready by worker threads, in their order, while the devices compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Feeder"]

Raw = TypeVar("Raw")
Ready = TypeVar("Ready")


class Feeder(Generic[Raw, Ready]):
    """Prepares what an iterator gives, a bounded number of items ahead.

    Items are read from the iterator by the thread that calls `take`.

    Args:
        items: read once, lazily.
        prepare: called in worker threads; must not raise what the caller is not to see.
        num_workers: threads.
        ahead: items that are in preparation or ready at any time, at most.
    """

    def __init__(
        self,
        items: Iterable[Raw],
        prepare: Callable[[Raw], Ready],
        *,
        num_workers: int,
        ahead: int,
    ):
        self._items: Iterator[Raw] = iter(items)
        self._prepare = prepare
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
        self._waiting: deque[Future[Ready]] = deque()
        self._exhausted = False

    def take(self, *, wait: bool) -> Ready | None:
        """The next item; None if there is none any more, or, without ``wait``, none ready yet."""
        self._fill()
        if not self._waiting or not (wait or self._waiting[0].done()):
            return None
        ready = self._waiting.popleft().result()
        self._fill()
        return ready

    @property
    def is_empty(self) -> bool:
        """Whether all items have been taken."""
        self._fill()
        return not self._waiting

    def close(self) -> None:
        """Takes in nothing more; what is being prepared is dropped."""
        self._exhausted = True
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while not self._exhausted and len(self._waiting) < self._ahead:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
                return
            self._waiting.append(self._pool.submit(self._prepare, item))
