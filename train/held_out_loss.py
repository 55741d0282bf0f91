"""The loss on conversations that are never trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array
from mllama_jax.train.data.batches import Collator
from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.placing import place_rows, rows_of_process
from mllama_jax.train.data.plan import PlannedBatch
from mllama_jax.train.data.records import BadRecord, DataError, Record, listed
from mllama_jax.train.evaluation import chosen
from mllama_jax.train.job import Job
from mllama_jax.train.step import Batch, TrainState


class HeldOutLoss:
    """The mean loss of all labels, in batches of the evaluation's size.

    Labels and lengths are those of training; nothing is packed, and ``optimizer.z_loss`` is left
    out. The conversations' text is prepared once.
    """

    def __init__(self, job: Job):
        """Raises DataError: conversations can't be used; names all of them."""
        config = job.config
        make = ExampleMaker(job.processor, replace(config.data, packing=False))
        records = _Records(chosen(job.held_out, config.evaluation.limit))
        self._batches = _batches(_examples(records, make), config.data.lengths, job)
        self._rows = rows_of_process(config.evaluation.batch_size, job.model.mesh)
        self._collate = Collator(job.processor, cast(Any, records), make, self._rows)
        self._job = job

    def __call__(
        self, state: TrainState, is_stopped: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Of a model as trained so far; None if `is_stopped` says so between two batches.

        Raises:
            DataError: a picture can't be read.
        """
        params = self._job.whole_params(state)
        sums = []
        for planned in self._batches:
            if is_stopped():
                return None
            batch = self._collate(planned)
            if batch.problems:
                raise DataError(f"held-out data can't be used:{listed(batch.problems)}")
            model, size = self._job.model, len(planned.rows)
            placed = place_rows(batch.arrays, self._rows, size, model.mesh)
            sums.append(_loss(params, placed, model=model))
        totals, counts = np.array(jax.device_get(sums), np.float64).T
        return float(totals.sum() / counts.sum())


@partial(jax.jit, static_argnames="model")
def _loss(
    params: Params, batch: Batch, *, model: MllamaForConditionalGeneration
) -> tuple[Array, Array]:
    """The sum over the labels, and their number: what `train_step` makes its mean of."""
    inputs: Any = batch
    return cast(Any, model.apply({"params": params}, **inputs, method="loss"))


class _Records:
    """What `Collator` reads pictures from."""

    def __init__(self, records: Sequence[Record]):
        self.all = records

    def record(self, number: int) -> Record:
        return self.all[number]


def _examples(records: _Records, make: ExampleMaker) -> list[Example]:
    found, problems = [], []
    for number, record in enumerate(records.all):
        try:
            found.append(make(number, record))
        except BadRecord as problem:
            problems.append(problem)
    if problems:
        raise DataError(f"held-out data can't be used:{listed(problems)}")
    return found


def _batches(examples: Sequence[Example], lengths: Sequence[int], job: Job) -> list[PlannedBatch]:
    """Equally many pictures and like lengths together; the last is filled up with empty rows."""
    ordered = sorted(examples, key=lambda example: (example.num_images, len(example.ids)))
    size = job.config.evaluation.batch_size
    pad = np.zeros(1, np.int32)
    nothing = Example(0, "", pad, np.full_like(pad, IGNORED_LABEL), 0)
    found = []
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        longest = max(len(example.ids) for example in rows)
        length = next(length for length in lengths if length >= longest)
        num_images = max(example.num_images for example in rows)
        filled = rows + [nothing] * (size - len(rows))
        found.append(PlannedBatch([[example] for example in filled], length, num_images))
    return found
