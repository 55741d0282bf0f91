"""A profiler's trace of some steps, on request."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import jax
from etils import epath


class Profiler:
    """Traces from the first to the last step that it is told; use around all steps.

    A run that goes on from a checkpoint between the two traces from there.
    """

    def __init__(self, folder: epath.Path, steps: Sequence[int]):
        """Args: where the trace is written; first and last step, or nothing."""
        self._folder = os.fspath(folder)
        self._first, self._last = steps or (0, 0)
        self._runs = False
        self._step = ExitStack()

    def before(self, step: int) -> None:
        """Before a step is dispatched."""
        if self._first <= step <= self._last:
            if not self._runs:
                options = jax.profiler.ProfileOptions()
                # It hooks into all threads, those of checkpoints and data too, and has crashed so.
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._folder, profiler_options=options)
                self._runs = True
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def after(self, step: int, results: Any) -> None:
        """Behind it; ends the trace behind its last step, when the device has done it."""
        self._step.close()
        if self._runs and step >= self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._runs = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._step.close()
        if self._runs:
            self._stop()
