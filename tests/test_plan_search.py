"""The search for the largest batch: right whatever the memory's line, and in few compilations."""

import dataclasses

import pytest

from mllama_jax.plan.job import Job
from mllama_jax.plan.record import Amount, Bound, Memory, Plan, Rate
from mllama_jax.plan.report import trials
from mllama_jax.plan.search import CHEAPEST_FIRST, RUNGS, run_search

USABLE = 16_000
SLOPES = {"none": 4.0, "dots": 2.5, "attention": 1.5, "full": 1.0, None: 1.0}
SECONDS = {"none": 1.0, "dots": 1.1, "attention": 1.25, "full": 1.3, None: 1.0}


class Compiler:
    """Memory of a line over the batch; bytes are whole numbers, as a compiler's are."""

    def __init__(self, start, slope, groups):
        self.start, self.slope, self.groups = start, slope, groups
        self.asked = []

    def needed(self, remat, batch):
        return round(self.start + self.slope * SLOPES[remat] * batch / self.groups)

    def plan(self, job):
        self.asked.append((job.remat, job.batch))
        assert job.batch % self.groups == 0
        memory = Memory(USABLE, (Amount("all", self.needed(job.remat, job.batch), "compiler"),))
        bound, rates = None, ()
        if memory.fits:
            # A step has some work that does not depend on the batch.
            seconds = SECONDS[job.remat] * (job.batch / self.groups + 1)
            bound = Bound(seconds, (), "compute", 0.5)
            rates = (Rate("samples/s", job.batch / seconds),)
        return Plan(job, "TPU", 8, "", memory, (), (), bound, rates, (), (), 1.0, {})

    def largest(self, remat):
        fitting = [n for n in RUNGS if self.needed(remat, n * self.groups) <= USABLE]
        return max(fitting, default=0) * self.groups


@pytest.mark.parametrize("start", [0, 3_000, 15_000])
@pytest.mark.parametrize("slope", [7, 90, 1_000, 12_345])
@pytest.mark.parametrize("groups", [1, 8])
def test_the_largest_batch_is_found_in_few_compilations(start, slope, groups):
    compiler = Compiler(start, slope, groups)
    found = run_search(Job(task="decode"), groups, compiler.plan, max_compiles=99)
    best = 0 if found.best is None else found.best.job.batch
    assert best == compiler.largest(None)
    assert len(compiler.asked) == len(set(compiler.asked)) <= 5


@pytest.mark.parametrize("slope", [90, 1_000])
def test_every_policy_is_tried_at_its_largest_batch(slope):
    compiler = Compiler(6_000, slope, 4)
    found = run_search(Job(task="train"), 4, compiler.plan, max_compiles=99)
    for remat in CHEAPEST_FIRST:
        tried = [plan.job.batch for plan in found.trials if plan.job.remat == remat and plan.fits]
        assert max(tried) == compiler.largest(remat)
    fastest = max(found.trials, key=lambda plan: plan.rates[0].value if plan.rates else 0)
    assert found.best is fastest
    assert len(compiler.asked) == len(set(compiler.asked)) <= 14
    assert trials(found).count("<- best") == 1


def test_a_given_batch_takes_the_cheapest_policy_that_fits():
    compiler = Compiler(6_000, 1_000, 1)
    found = run_search(Job(task="train", batch=5), 1, compiler.plan)
    assert found.best is not None
    assert found.best.job.remat == "attention"  # 6000 + 5 × 1500; dots takes 18500
    assert compiler.asked == [("none", 5), ("dots", 5), ("attention", 5)]


def test_nothing_fits():
    compiler = Compiler(20_000, 10, 1)
    found = run_search(Job(task="train"), 1, compiler.plan)
    assert found.best is None
    assert compiler.asked == [("full", 1)]


def test_the_search_ends_after_so_many_compilations():
    compiler = Compiler(3_000, 7, 1)
    run_search(Job(task="train"), 1, compiler.plan, max_compiles=3)
    assert len(compiler.asked) == 3


def test_what_is_not_compiled_costs_nothing():
    compiler = Compiler(20_000, 10, 1)

    def plan(job):
        return dataclasses.replace(compiler.plan(job), compile_seconds=None)

    assert len(run_search(Job(task="train"), 1, plan, max_compiles=1).trials) == 1
