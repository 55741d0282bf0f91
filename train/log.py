"""Numbers of steps on their way to files, curves and the screen."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from mllama_jax.train.curves import Curves
from mllama_jax.train.data.batches import HostBatch
from mllama_jax.train.data.records import BadRecord, listed
from mllama_jax.train.evaluation import Answer, scores, table
from mllama_jax.train.job import Job
from mllama_jax.train.metrics import MetricsFile, Numbers, Progress
from mllama_jax.train.samples import write_samples
from mllama_jax.train.speed import Speed, described
from mllama_jax.train.step import Metrics


class Log:
    """They wait on the device, so that no step is held up for being reported.

    Use as a context manager around the steps.
    """

    def __init__(self, job: Job, resumed: int):
        """Args: what runs; the step that it goes on from, 0 for a new run."""
        self._job = job
        self._files: dict[str, MetricsFile] = {}
        self._curves: Curves | None = None
        config = job.config
        if jax.process_index() == 0:  # the others only show their problems
            self._files = {
                name: MetricsFile(job.output / f"{name}.jsonl", resumed)
                for name in ("metrics", "speed")
            }
            settings = dataclasses.asdict(config)
            self._curves = Curves(job.output, config.logging, resumed, settings)
        self._progress = Progress(resumed, config.steps)
        self._speed = Speed(job)
        self._in_a_row = 0
        self._waiting: list[tuple[int, Metrics, Numbers]] = []

    def say(self, text: str) -> None:
        """Prints something between the progress lines."""
        self._progress.say(text)

    def timed(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """The same batches; how long the run waits for them is measured."""
        return self._speed.timed(batches)

    def add(self, step: int, metrics: Metrics, batch: HostBatch, bad: int) -> None:
        """Notes a step that was dispatched.

        Args:
            step: its number.
            metrics: of the step, on the device.
            batch: that it learned from.
            bad: records so far that nothing was learned from.
        """
        counts: dict[str, float] = {}
        if self._job.config.data.max_bad_records:
            counts["bad_records"] = bad
        if self._job.config.data.packing:
            counts |= {"conversations": batch.num_examples, "filled": batch.filled}
        self._waiting.append((step, metrics, counts))
        self._speed.dispatched(metrics["loss"])

    def flush(self) -> None:
        """Writes every waiting step and shows the last.

        Raises:
            FloatingPointError: too many steps in a row changed nothing.
        """
        if not self._waiting:
            return
        for step, metrics, counts in jax.device_get(self._waiting):
            numbers = {**{name: value.item() for name, value in metrics.items()}, **counts}
            self._write("metrics", "train", step, numbers)
            self._in_a_row = self._in_a_row + 1 if numbers["skipped"] else 0
            if numbers["skipped"]:
                self._skipped(step, numbers)
        self._waiting.clear()
        speed = self._speed.measured()
        self._write("speed", "speed", step, speed)
        self._show()
        self._progress.report(step, numbers, described(speed))

    def _skipped(self, step: int, numbers: Numbers) -> None:
        """Says why a step changed nothing."""
        why = "no label counts"
        if numbers["labels"]:
            why = f"the loss is {numbers['loss']}, the gradient norm {numbers['grad_norm']}"
        self.say(f"step {step}: skipped, {why}")
        limit = self._job.config.optimizer.max_skipped
        if self._in_a_row > limit:
            raise FloatingPointError(
                f"step {step}: {why}; {self._in_a_row} steps in a row were skipped, more than "
                f"optimizer.max_skipped={limit}. Look at the data, or lower "
                "optimizer.learning_rate or optimizer.max_grad_norm."
            )

    def evaluation(
        self, step: int, answers: Sequence[Answer], loss: float, problems: Sequence[BadRecord]
    ) -> None:
        """Writes and shows how held-out questions were answered; earlier steps are flushed.

        Args:
            step: after which they were asked.
            answers: to all of them that could be asked.
            loss: of the held-out conversations.
            problems: of those that could not.
        """
        if problems:
            said = f"Held-out questions that could not be asked, {len(problems)}:{listed(problems)}"
            self._progress.say(said)
        found = scores(answers)
        accuracies = {f"accuracy/{score.kind}": score.accuracy for score in found}
        numbers = {"eval_loss": loss, **accuracies}
        if problems:
            numbers["eval_unreadable"] = len(problems)
        self._write("metrics", "held_out", step, numbers)
        self._show()
        self._progress.say(f"Held-out answers after step {step}, loss {loss:.4f}:\n{table(found)}")
        shown = answers[: self._job.config.logging.samples]
        if self._curves is None or not shown:
            return
        self._curves.samples(step, shown)
        self._curves.flush()
        page = write_samples(self._job.output / "samples", step, shown, numbers)
        self.say(f"Samples: {page}")

    def _write(self, file: str, group: str, step: int, numbers: Numbers) -> None:
        if self._curves is not None:
            self._files[file].add(step, numbers)
            self._curves.add(group, step, numbers)

    def _show(self) -> None:
        """Lets readers see all that was written."""
        if self._curves is not None:
            for file in self._files.values():
                file.flush()
            self._curves.flush()

    def __enter__(self) -> "Log":
        self._progress.__enter__()
        self._speed.__enter__()
        if about := self._speed.about_peak():
            self.say(about)
        return self

    def __exit__(self, *error: object) -> None:
        self._speed.__exit__(*error)
        if self._curves is not None:
            self._curves.close()
        self._progress.__exit__(*error)  # type: ignore[arg-type]
