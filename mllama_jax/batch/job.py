"""A job: requests of a file or a folder through the engine into a results file."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama_jax.batch.answers import Answer, Failure
from mllama_jax.batch.engine import Engine
from mllama_jax.batch.inputs import Shard, Source, items
from mllama_jax.batch.metrics import MetricsWriter
from mllama_jax.batch.progress import BatchProgress
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.batch.responses import error_line, response_line
from mllama_jax.batch.results_file import ResultsFile, as_bytes
from mllama_jax.batch.stats import EngineStats
from mllama_jax.batch.stopping import GraceOver, Stopping
from mllama_jax.batch.summary import Summary
from mllama_jax.processing.tokenizer import MllamaTokenizer

__all__ = ["Outcome", "run_job"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        total: requests of the job, or of this shard of it.
        done: those with a result, of earlier runs too.
        errors: those of them whose result is an error.
        stopped_by: "SIGTERM" or "SIGINT", if that ended it.
        gave_up: whether requests that had begun were dropped at the deadline.
        summary: lines for people.
    """

    total: int
    done: int
    errors: int
    stopped_by: str | None
    gave_up: bool
    summary: str


def run_job(
    engine: Engine,
    source: Source,
    results: ResultsFile,
    *,
    tokenizer: MllamaTokenizer,
    model_name: str,
    shard: Shard | None = None,
    grace: float = 30.0,
    metrics: Path | None = None,
    show: bool = True,
) -> Outcome:
    """Answers all requests that have no result yet; each result is written when it is there.

    SIGTERM and SIGINT stop it: requests that have a slot are finished, the others are left for the
    next run.

    Args:
        engine: answers them; it has to be a new one after a stop.
        source: the requests.
        results: where results go, and what is done.
        tokenizer: of the engine's processor.
        model_name: what results name as their model.
        shard: the part that is this process's; all of it by default.
        grace: seconds for what has begun once it is told to stop.
        metrics: a file for numbers while it runs.
        show: progress on standard error.

    Raises:
        OSError: results can't be written.
    """
    shard = shard or Shard()
    job = _Job(engine, source, results, shard, tokenizer, model_name)
    skipped = len(results.done)
    total = source.count(shard)
    gave_up = False
    stopping = Stopping(job.stop, grace)
    progress = BatchProgress(job.stats, total=total, skipped=skipped, show=show)
    numbers = MetricsWriter(metrics, job.stats)
    with stopping, progress, numbers:

        def show_progress() -> None:
            progress.update()
            numbers.update()
            job.summary.update(job.stats())
            results.update()

        try:
            for result in engine.run(job.requests(stopping), after_step=show_progress):
                with stopping.held():
                    job.write(result)
            stopping.disarm()
        except GraceOver:
            stopping.disarm()
            gave_up = True
        results.sync()
    text = job.summary.text(job.stats(), stopping.by)
    if stopping.by is not None:
        text += f"\n{results.num_lines:,} of {total:,} requests have a result."
    return Outcome(total, results.num_lines, results.num_errors, stopping.by, gave_up, text)


class _Job:
    """Between the engine and the files."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        results: ResultsFile,
        shard: Shard,
        tokenizer: MllamaTokenizer,
        model_name: str,
    ):
        self._engine, self._source, self._results = engine, source, results
        self._shard, self._tokenizer, self._model_name = shard, tokenizer, model_name
        self._before = engine.stats
        self._unreadable = 0
        self._stopped = False
        self.summary = Summary(len(results.done))

    def stop(self) -> None:
        self._stopped = True
        self._engine.stop()

    def stats(self) -> EngineStats:
        """The engine's in this job, with the requests that it never saw."""
        stats = self._engine.stats.since(self._before)
        return dataclasses.replace(stats, failed=stats.failed + self._unreadable)

    def requests(self, stopping: Stopping) -> Iterator[Request]:
        """What is left to do; what can't be read gets its result here."""
        for item in items(self._source, self._shard, self._results.done):
            if self._stopped:
                return
            if isinstance(item.request, Request):
                yield item.request
                continue
            self._unreadable += 1
            with stopping.held():
                self.write(Failure(item.custom_id or "", item.request))

    def write(self, result: Answer | Failure) -> None:
        """Appends a result's line."""
        line: dict[str, Any] = {}
        if isinstance(result, Answer):
            try:
                line = self._line(result)
            except Exception as error:  # one answer's trouble is not that of the others
                text = f"its answer can't be written: {type(error).__name__}: {error}"
                custom_id = result.prepared.request.custom_id
                result = Failure(custom_id, RequestError(text, status_code=500))
        if isinstance(result, Failure):
            line = error_line(result.custom_id or None, result.error)
        self._results.append(line)
        self.summary.add(result)

    def _line(self, answer: Answer) -> dict[str, Any]:
        line = response_line(
            answer,
            model_name=self._model_name,
            tokenizer=self._tokenizer,
            created=int(time.time()),
        )
        as_bytes(line)  # raises what writing it would
        return line
