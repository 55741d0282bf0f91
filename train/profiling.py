"""A profiler's trace of some steps, on request."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from etils import epath

from mllama_jax.train.step import TrainState


class Profiler:
    """Traces from the first to the last step that it is told; use around all steps.

    A run that goes on from a checkpoint between the two traces from there.
    """

    def __init__(self, folder: epath.Path, steps: Sequence[int]):
        """Args: where the trace is written; first and last step, or nothing."""
        self._folder = os.fspath(folder)
        self._first, self._last = steps or (0, 0)
        self._runs = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step."""
        if not self._runs and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._runs = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, state: TrainState) -> None:
        """Ends the trace behind its last step, when the device has done it."""
        if self._runs and step >= self._last:
            jax.block_until_ready(state.step)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._runs = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        if self._runs:
            self._stop()
