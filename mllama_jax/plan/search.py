"""The largest batch and the cheapest rematerialisation that fit, in few compilations."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from mllama_jax.execution import RematPolicy
from mllama_jax.plan.job import Job
from mllama_jax.plan.record import Plan

CHEAPEST_FIRST: tuple[RematPolicy, ...] = ("none", "dots", "attention", "full")
"""By how much of the forward pass is computed once more."""

RUNGS = tuple(n * 2**k for k in range(20) for n in ((2, 3) if k else (1, 2, 3)))
"""Samples of each group of devices that may be tried: no finer steps are worth a compilation."""


@dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
        trials: in their order.
        best: of those that fit, the one with the highest bound on samples a second (for decoding,
            tokens); None if none fits.
    """

    trials: tuple[Plan, ...]

    @property
    def best(self) -> Plan | None:
        fitting = [plan for plan in self.trials if plan.fits and plan.rates]
        return max(fitting, key=lambda plan: plan.rates[0].value, default=None)


def run_search(
    job: Job,
    groups: int,
    make_plan: Callable[[Job], Plan],
    max_compiles: int = 8,
) -> Search:
    """Varies the batch, and in training the rematerialisation, where the job leaves them open.

    Memory grows with the batch along a line, so two compilations predict where it ends. The
    policies have that line's start in common: what does not depend on the batch.

    Args:
        job: whose ``batch`` and ``remat`` are None where they are to be found.
        groups: of devices that share samples: batches are multiples of it.
        make_plan: compiles, or remembers.
        max_compiles: after so many the search ends with what it has.
    """
    tried: list[Plan] = []

    def left() -> int:
        return max_compiles - sum(plan.compile_seconds is not None for plan in tried)

    def attempt(remat: str | None, batch: int | None) -> Plan:
        plan = make_plan(dataclasses.replace(job, remat=remat, batch=batch))
        tried.append(plan)
        return plan

    def climb(remat: str | None, first: int, line: "_Line") -> None:
        """Finds the largest batch of one policy."""
        low, high, rung = -1, len(RUNGS), first
        while low < rung < high and left() > 0:
            plan = attempt(remat, RUNGS[rung] * groups)
            line.add(RUNGS[rung], plan.memory.needed)
            low, high = (rung, high) if plan.fits else (low, rung)
            guess = _last_rung(line.reaches(plan.memory.usable))
            rung = min(max(guess, low + 1), high - 1)

    if job.batch is not None:
        policies = [job.remat] if job.remat or not job.trains else list(CHEAPEST_FIRST)
        for remat in policies:
            if left() > 0 and attempt(remat, job.batch).fits:
                break
        return Search(tuple(tried))

    leanest = job.remat or ("full" if job.trains else None)
    line = _Line()
    climb(leanest, 0, line)
    if job.trains and job.remat is None and any(plan.fits for plan in tried):
        largest = max(plan.job.batch or 0 for plan in tried if plan.fits) // groups
        for remat in CHEAPEST_FIRST[:-1]:
            climb(remat, _last_rung(largest), _Line(line.start))
    return Search(tuple(tried))


class _Line:
    """Memory over batch, through the last two points, or from where a like line starts."""

    def __init__(self, start: float | None = None):
        self._points: list[tuple[float, float]] = [] if start is None else [(0.0, start)]

    def add(self, batch: int, needed: int) -> None:
        self._points.append((batch, needed))

    @property
    def start(self) -> float:
        """Memory at batch 0; as if all of it grew with the batch while there is one point."""
        return self._points[-1][1] - self._slope * self._points[-1][0]

    def reaches(self, usable: int) -> float:
        """The batch at which so much is needed."""
        batch, needed = self._points[-1]
        return batch + (usable - needed) / self._slope if self._slope > 0 else math.inf

    @property
    def _slope(self) -> float:
        (x0, y0), (x1, y1) = ([(0.0, 0.0), *self._points])[-2:]
        return (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0


def _last_rung(batch: float) -> int:
    """The largest rung that is not above a batch; the first if all are."""
    return max([i for i, rung in enumerate(RUNGS) if rung <= batch], default=0)
