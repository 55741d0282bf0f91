"""A job that is told to stop: it finishes what it has begun, up to a deadline."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["GraceOver", "Stopping"]

_SECONDS_BETWEEN_ALARMS = 5.0


class GraceOver(BaseException):
    """The deadline has passed. No Exception, so that nothing on its way takes it for an error."""


class Stopping:
    """Listens to SIGTERM and SIGINT; use as a context manager around the work.

    The first signal calls ``stop``. So many seconds later `GraceOver` is raised, wherever the work
    is. A SIGINT after that ends the process at once.

    In threads other than the main one, which signals don't reach, it does nothing.

    Args:
        stop: makes the work come to its end; called between any two of its steps.
        grace: seconds.

    Attributes:
        by: the name of the signal, None if there was none.
    """

    def __init__(self, stop: Callable[[], None], grace: float):
        self._stop, self._grace = stop, grace
        self._before: dict[int, Any] = {}
        self._held = self._late = False
        self.by: str | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """`GraceOver` waits for the end of what is done in it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._late:
            raise GraceOver

    def disarm(self) -> None:
        """No `GraceOver` from now on."""
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._told)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disarm()
        for number, handler in self._before.items():
            # None is what a library has installed, and can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self.by is not None:  # some send SIGTERM twice
            return
        self.by = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: this may be in the middle of one.
        os.write(
            2,
            f"\n{self.by}: finishing what has begun, for up to {self._grace:g} seconds "
            "(Ctrl-C stops at once)\n".encode(),
        )
        # Zero would mean never. Again and again, for where Python drops exceptions.
        first = max(self._grace, 1e-6)
        signal.setitimer(signal.ITIMER_REAL, first, _SECONDS_BETWEEN_ALARMS)
        self._stop()

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        self._late = True
        if not self._held:
            raise GraceOver
