"""Records that nothing was learned from: named in a file, counted against the limit."""

import json
from collections.abc import Sequence

import jax
from etils import epath

from mllama_jax.train.data.records import BadRecord, DataError, listed
from mllama_jax.train.metrics import replace_text


class SkippedRecords:
    """Each record once, with the step that first came upon it: 0 for those found before.

    The file, ``bad_records.jsonl``, has a line ``{"step": …, "where": …, "why": …}`` for each. In
    a job of several processes each names those that it comes upon, the others in
    ``bad_records-1.jsonl`` and so on, and the limit holds for each.
    """

    def __init__(
        self, folder: epath.PathLike, limit: int, found: Sequence[BadRecord], resumed_step: int
    ):
        """Args: the run's folder; the limit; those found before the first step; the step that
        the run goes on from, 0 at its start: later ones in the file will be come upon again.
        """
        index = jax.process_index()
        name = f"bad_records-{index}.jsonl" if index else "bad_records.jsonl"
        self._file = epath.Path(folder) / name
        self._limit = limit
        self._steps = {problem.where: 0 for problem in found}
        kept = [_line(0, problem) for problem in found]
        if resumed_step and self._file.exists():
            for line in self._file.read_text().splitlines():
                values = json.loads(line)
                if 0 < values["step"] <= resumed_step:
                    self._steps[values["where"]] = values["step"]
                    kept.append(line)
        self._lines = kept
        if kept or self._file.exists():
            self._write()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, problems: Sequence[BadRecord]) -> list[BadRecord]:
        """Notes the problems of a step's batch; returns those of records not yet known.

        Raises:
            DataError: they are more than the limit now.
        """
        new = []
        for problem in problems:
            if problem.where not in self._steps:
                self._steps[problem.where] = step
                self._lines.append(_line(step, problem))
                new.append(problem)
        if new and len(self) > self._limit:
            counted = ""
            if self._limit:
                counted = f" {len(self)} bad records, data.max_bad_records={self._limit};"
            raise DataError(f"step {step}: the data can't be used:{counted}{listed(new)}")
        if new:
            self._write()
        return new

    def _write(self) -> None:
        replace_text(self._file, "".join(line + "\n" for line in self._lines))


def _line(step: int, problem: BadRecord) -> str:
    return json.dumps({"step": step, "where": problem.where, "why": problem.why})
