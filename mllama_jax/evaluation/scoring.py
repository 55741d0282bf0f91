"""Answers of a results file scored against the references of their questions, and summed up."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mllama_jax.batch.results_file import as_bytes, read_job, read_results, replace_file
from mllama_jax.evaluation.choices import chosen_letter
from mllama_jax.evaluation.metrics import FEWEST_FOR_VQA, METRICS
from mllama_jax.evaluation.questions import Question, Questions

__all__ = [
    "METRIC_NAMES",
    "Answered",
    "Score",
    "check_metrics",
    "counts",
    "rows",
    "score_answers",
    "sum_up",
    "write_scores",
]

MULTIPLE_CHOICE = "multiple_choice"
METRIC_NAMES = (*METRICS, MULTIPLE_CHOICE)

_DEVIATIONS = 1.959964
"""Of a normal distribution, on both sides of its mean: 95 %."""


@dataclass(frozen=True)
class Answered:
    """What became of a question.

    Attributes:
        index: of the question in its file.
        id, category: the question's.
        text: the answer; empty if there is none.
        finish_reason: why the answer ends: "stop" or "length"; None if there is none.
        error: why there is no answer.
        scores: by metric, from 0 to 1; an error scores 0.
        letter: that the answer to a question with choices means; None if it can't be told.
    """

    index: int
    id: str
    category: str
    text: str
    finish_reason: str | None
    error: str | None
    scores: dict[str, float]
    letter: str | None = None

    @property
    def score(self) -> float:
        """The mean of all metrics'."""
        return fmean(self.scores.values())

    @property
    def is_unparsed(self) -> bool:
        """Whether it is an answer that means no choice."""
        return MULTIPLE_CHOICE in self.scores and self.letter is None and self.error is None


@dataclass(frozen=True)
class Score:
    """The mean of a metric over the questions of a category.

    Attributes:
        count: of the questions.
        score: mean, from 0 to 1.
        low, high: Wilson's interval, which covers the mean of the questions' population in 95 of
            100 cases where each scores 0 or 1, and in more where they score between.
    """

    count: int
    score: float
    low: float
    high: float


def score_answers(
    questions: Questions, results: Path, metrics: Sequence[str] = ()
) -> Iterator[Answered]:
    """Scores all answers, in the order of their questions.

    Args:
        questions: which were asked.
        results: the file of a job that has answered all of them.
        metrics: names from `METRIC_NAMES`; none: the one that fits each question.

    Raises:
        ValueError: a metric does not fit a question; a question has no result.
    """
    given = {line["custom_id"]: _given(line) for _, _, line in read_results(results)}
    for index, question in enumerate(questions):
        if question.id not in given:
            raise ValueError(f"{results}: there is no result of the question {question.id!r}")
        text, reason, error = given[question.id]
        names = metrics or (fitting_metric(question),)
        letter = chosen_letter(text, question.choices) if MULTIPLE_CHOICE in names else None
        scores = dict.fromkeys(names, 0.0)
        if error is None:
            scores = {name: _score(name, question, text, letter) for name in names}
        yield Answered(index, question.id, question.category, text, reason, error, scores, letter)


def _given(line: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """The answer, why it ends, and the error in its place."""
    if line["error"] is not None:
        return "", None, str(line["error"]["message"])
    [choice] = line["response"]["body"]["choices"]
    return choice["message"]["content"], choice["finish_reason"], None


def _score(metric: str, question: Question, text: str, letter: str | None) -> float:
    if metric == MULTIPLE_CHOICE:
        return float(letter == question.references[0])
    return METRICS[metric](text, question.references)


def fitting_metric(question: Question) -> str:
    """Multiple choice where there are choices, VQA accuracy where enough people have answered,
    else exact match."""
    if question.choices:
        return MULTIPLE_CHOICE
    return "vqa" if len(question.references) >= FEWEST_FOR_VQA else "exact_match"


def check_metrics(questions: Iterable[Question], metrics: Sequence[str]) -> None:
    """Raises ValueError unless the metrics fit all questions."""
    for question in questions:
        if MULTIPLE_CHOICE in metrics and not question.choices:
            raise ValueError(
                f"the metric {MULTIPLE_CHOICE} needs 'choices', and the question "
                f"{question.id!r} has none"
            )
        count = len(question.references)
        if "vqa" in metrics and (question.choices or count < FEWEST_FOR_VQA):
            raise ValueError(
                f"the metric vqa needs the answers of ten people, or of at least {FEWEST_FOR_VQA}; "
                f"the question {question.id!r} has {1 if question.choices else count}"
            )


def sum_up(answers: Iterable[Answered]) -> dict[str, dict[str, Score]]:
    """For each metric the scores of all categories, ``"all"`` first, by their names.

    Only what a metric was asked for counts in its means.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        for metric, score in answer.scores.items():
            categories = sums.setdefault(metric, {"all": []})
            for category in dict.fromkeys(("all", answer.category)):
                categories.setdefault(category, []).append(score)
    return {
        metric: {category: _mean(scores) for category, scores in categories.items()}
        for metric, categories in sums.items()
    }


def _mean(scores: Sequence[float]) -> Score:
    count = len(scores)
    mean = fmean(scores)
    # Wilson 1927. No numbers from 0 to 1 with this mean vary more than zeros and ones do.
    share = _DEVIATIONS**2 / count
    centre = (mean + share / 2) / (1 + share)
    half = math.sqrt(share * mean * (1 - mean) + share**2 / 4) / (1 + share)
    return Score(count, mean, max(0.0, centre - half), min(1.0, centre + half))


def rows(scores: Mapping[str, Mapping[str, Score]]) -> list[tuple[str, ...]]:
    """The cells of a table of the scores, its head first."""
    found: list[tuple[str, ...]] = [("metric", "category", "questions", "score", "95% interval")]
    for metric, categories in scores.items():
        for category, s in categories.items():
            interval = f"{s.low:.1%} to {s.high:.1%}"
            found.append((metric, category, f"{s.count:,}", f"{s.score:.1%}", interval))
    return found


def counts(answers: Sequence[Answered]) -> dict[str, int]:
    """How many questions there were, and how many of them had no proper answer."""
    return {
        "questions": len(answers),
        "errors": sum(answer.error is not None for answer in answers),
        "unparsed": sum(answer.is_unparsed for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
    }


def write_scores(
    folder: Path, questions: Questions, answers: Sequence[Answered], results: Path
) -> None:
    """Writes ``scores.json`` and, with a line for each question, ``answers.jsonl``."""
    found = {
        **counts(answers),
        "metrics": {
            metric: {
                **asdict(categories["all"]),
                "categories": {
                    name: asdict(score) for name, score in categories.items() if name != "all"
                },
            }
            for metric, categories in sum_up(answers).items()
        },
        "job": read_job(results),
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    replace_file(folder / "scores.json", [f"{text}\n".encode()])
    pairs = zip(questions, answers, strict=True)
    replace_file(folder / "answers.jsonl", (as_bytes(_line(q, answer)) for q, answer in pairs))


def _line(question: Question, answer: Answered) -> dict[str, Any]:
    values = {
        "id": answer.id,
        "category": answer.category,
        "references": question.references,
        "answer": answer.text,
        "letter": answer.letter,
        "error": answer.error,
        "finish_reason": answer.finish_reason,
        "scores": answer.scores,
    }
    return {name: value for name, value in values.items() if value is not None}
