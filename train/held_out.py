"""Held-out conversations: their questions asked, and the loss of their answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.shapes import Array
from mllama_jax.train.components import joined
from mllama_jax.train.data.batches import Collator
from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.placing import place_rows, rows_of_process
from mllama_jax.train.data.plan import PlannedBatch
from mllama_jax.train.data.records import BadRecord, Record
from mllama_jax.train.evaluation import Answer, answer_records, chosen
from mllama_jax.train.job import Job
from mllama_jax.train.lora import scaled
from mllama_jax.train.settings import Recipe
from mllama_jax.train.step import Batch, TrainState


class HeldOut:
    """What is asked, as often as wanted; texts are prepared once, pictures each time.

    Attributes:
        problems: of the conversations that are left out of the loss, as training would leave them
            out.
    """

    def __init__(self, job: Job):
        """Args: the job, which has held-out conversations."""
        self._job = job
        config = job.config
        self._batch_size = config.evaluation.batch_size
        self._rows = rows_of_process(self._batch_size, job.model.mesh)
        self._lengths = np.array(config.data.lengths)
        self._records = _Records(chosen(job.held_out, config.evaluation.limit))
        make = ExampleMaker(job.processor, replace(config.data, packing=False))
        self.problems: list[BadRecord] = []
        self._batches = list(self._planned(list(self._examples(make))))
        self._collate = Collator(job.processor, self._records, make, self._rows)

    def is_due(self, step: int) -> bool:
        """Whether it is asked after this step, which is not the last."""
        every = self._job.config.evaluation.every
        return every > 0 and step % every == 0

    def answers(
        self, state: TrainState, is_stopped: Callable[[], bool], problems: list[BadRecord]
    ) -> list[Answer]:
        """As `answer_records`: none at all if told to stop in between."""
        job = self._job
        params = job.whole_params(state)
        settings = job.config.evaluation, job.config.data.date_string
        return answer_records(
            job.model, params, job.processor, self._records.records, *settings, is_stopped, problems
        )

    def _examples(self, make: ExampleMaker) -> Iterator[Example]:
        for number, record in enumerate(self._records.records):
            try:
                yield make(number, record)
            except BadRecord as problem:
                self.problems.append(problem)

    def _planned(self, examples: Sequence[Example]) -> Iterator[PlannedBatch]:
        """Examples of like shape together; the last batch is filled up with empty rows."""
        padded = np.searchsorted(self._lengths, [len(example.ids) for example in examples])
        by_shape = np.lexsort((padded, np.array([example.num_images for example in examples])))
        for start in range(0, len(examples), self._batch_size):
            batch = [examples[i] for i in by_shape[start : start + self._batch_size]]
            rows = [[example] for example in batch]
            rows += [[]] * (self._batch_size - len(rows))
            longest = max(len(example.ids) for example in batch)
            length = int(self._lengths[np.searchsorted(self._lengths, longest)])
            yield PlannedBatch(rows, length, max(example.num_images for example in batch))

    def loss(
        self, state: TrainState, is_stopped: Callable[[], bool] = lambda: False
    ) -> float | None:
        """That of training, the mean over all labels that count; NaN if there are none.

        Conversations whose pictures can't be read are left out. None if `is_stopped` says so
        between two batches.
        """
        job, total, count = self._job, 0.0, 0
        for planned in self._batches:
            if is_stopped():
                return None
            arrays = self._collate(planned).arrays
            batch = place_rows(arrays, self._rows, self._batch_size, job.model.mesh)
            found = _summed_loss(
                *(state.params, job.frozen, batch), model=job.model, recipe=job.config.recipe
            )
            of_batch, labels = jax.device_get(found)
            total, count = total + float(of_batch), count + int(labels)
        return total / count if count else float("nan")


class _Records:
    """Records in memory, by number."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    def record(self, index: int) -> Record:
        return self.records[index]


@partial(jax.jit, static_argnames=("model", "recipe"))
def _summed_loss(
    trained: Params, frozen: Params, batch: Batch, *, model: PretrainedModule, recipe: Recipe
) -> tuple[Array, Array]:
    """As training's, but for z_loss, which is no part of what the model says."""
    variables = {"params": joined(frozen, scaled(trained, recipe.lora))}
    inputs: Any = batch  # none of them is one of apply's own arguments
    return cast(tuple[Array, Array], model.apply(variables, **inputs, method="loss"))
