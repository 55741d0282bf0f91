"""Being told to stop: a run ends after the step that it is at, with a checkpoint of it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

__all__ = ["Stopped", "Stopping"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was told to stop, and goes on from a checkpoint when it is started again.

    Attributes:
        signal: what told it to.
        step: of the checkpoint.
    """

    def __init__(self, by: signal.Signals, step: int):
        super().__init__(f"stopped by {by.name} after step {step}")
        self.signal, self.step = by, step


class Stopping:
    """Listens to SIGTERM and SIGINT; use as a context manager around the steps.

    In a job of several processes JAX listens to SIGTERM, and sees to it that all of them stop at
    the same place, whichever was told to; SIGINT ends a process at once there. A second SIGINT does
    so everywhere.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self._calls = 0
        self._is_shared = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether to stop now; to be called by all processes, equally often.

        That is after every step, and between the batches of an evaluation.
        """
        self._calls += 1
        # JAX settles on a number of calls that no process has reached yet.
        if self._is_shared and multihost_utils.reached_preemption_sync_point(self._calls):
            self.by = signal.SIGTERM
        return self.by is not None

    def __enter__(self) -> Self:
        # Python gives signals to the main thread only.
        if not self._is_shared and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._listen) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, number: int, _: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
