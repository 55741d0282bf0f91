"""Requests made ready by worker threads while the devices compute; first ready, first out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Condition
from typing import Generic, TypeVar

__all__ = ["Feeder"]

Raw = TypeVar("Raw")
Ready = TypeVar("Ready")


class Feeder(Generic[Raw, Ready]):
    """Prepares what an iterator gives, a bounded number of items and of bytes ahead.

    Items are read from the iterator, in its order, by the thread that calls `take`. They come out
    in the order in which they are ready: one that takes long holds nothing else up.

    Args:
        items: read once, lazily.
        prepare: called in worker threads; must not raise what the caller is not to see.
        num_workers: threads.
        ahead: items that are in preparation or ready at any time, at most.
        size: bytes that an item holds, before or after its preparation.
        room: bytes of items; once there are as many, none is read, and none prepared. Those that
            the threads are at come on top.
    """

    def __init__(
        self,
        items: Iterable[Raw],
        prepare: Callable[[Raw], Ready],
        *,
        num_workers: int,
        ahead: int,
        size: Callable[[Raw | Ready], int],
        room: int,
    ):
        self._items: Iterator[Raw] = iter(items)
        self._prepare = prepare
        self._ahead, self._size, self._room = ahead, size, room
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
        self._changed = Condition()
        # Guarded by it:
        self._ready: deque[Future[Ready]] = deque()
        self._count = self._raw_bytes = self._ready_bytes = 0
        self._closed = False
        self._exhausted = False

    def take(self, *, wait: bool) -> Ready | None:
        """What is ready first; None if there is nothing any more, or, without ``wait``, nothing
        ready yet."""
        self._fill()
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._ready or not self._count)
            if not self._ready:
                return None
            future = self._ready.popleft()
            self._count -= 1
            ready = future.result()
            self._ready_bytes -= self._size(ready)
            self._changed.notify_all()
        self._fill()
        return ready

    @property
    def is_empty(self) -> bool:
        """Whether all items have been taken."""
        self._fill()
        return not self._count

    def close(self) -> None:
        """Takes in nothing more; what is being prepared is dropped."""
        self._exhausted = True
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while not self._exhausted and self._may_read:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
                return
            size = self._size(item)
            with self._changed:
                self._count += 1
                self._raw_bytes += size
            self._pool.submit(self._work, item).add_done_callback(partial(self._done, size))

    @property
    def _may_read(self) -> bool:
        with self._changed:
            held = self._raw_bytes + self._ready_bytes
            return self._count < self._ahead and (not self._count or held < self._room)

    def _work(self, item: Raw) -> Ready:
        """In a worker thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready_bytes < self._room)
        return self._prepare(item)

    def _done(self, raw_size: int, future: Future[Ready]) -> None:
        with self._changed:
            self._raw_bytes -= raw_size
            if not (future.cancelled() or future.exception()):
                self._ready_bytes += self._size(future.result())
            self._ready.append(future)
            self._changed.notify_all()
