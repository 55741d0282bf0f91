"""The command, with the example model: its answers, scores and page, stopped and carried on."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from asking import EXAMPLE, LOADED, PICTURES, PROCESSOR
from test_batch_report import Page

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.cli import main
from mllama_jax.evaluation import scoring
from mllama_jax.evaluation.page import write_page
from mllama_jax.evaluation.questions import Questions
from mllama_jax.evaluation.scoring import Answered, sum_up
from mllama_jax.train.config import EvaluationConfig
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import answer_records, scores

DEMO = EXAMPLE / "demo"
ASKED = ("Which digit is this?", "Even or odd?", "Name the digit.")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled() -> Iterator[None]:
    """Programs that are used a few times only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen questions, in the form and folder of the example's data."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(DEMO / "pictures", folder / "pictures")
    records = read(DEMO / "questions.jsonl")
    for number, (picture, text) in enumerate((p, t) for p in PICTURES for t in ASKED[:2]):
        part = {"type": "image", "image": f"pictures/{picture.name}"}
        content = [part, {"type": "text", "text": text}]
        answer = f"It is {('a 7', 'odd')[number % 2]}."
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        records.append({"kind": text, "messages": messages})
    return write(folder / "questions.jsonl", records)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Command:
    """Runs the command; returns its exit status and all that it says."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    # The settings of this process are those of the other tests, too.
    monkeypatch.setattr("jax.config.update", lambda *_: None)

    def run(questions: Path, output: Path, *words: Any) -> tuple[int, str]:
        options = {
            "--model": EXAMPLE / "model",
            "-i": questions,
            "-o": output,
            "--max-tokens": 16,
            "--num-slots": 3,
            "--max-length": 96,
            "--max-tiles": 8,
        }
        given = (str(word) for item in options.items() for word in item)
        monkeypatch.setattr("sys.argv", ["mllama-jax", "eval", *given, *map(str, words)])
        status: Any = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        said = capfd.readouterr()
        return status, said.out + said.err

    return run


def test_the_same_answers_and_accuracy_as_one_by_one(
    conversations: Path, tmp_path: Path, command: Command
):
    status, said = command(conversations, tmp_path)
    assert status == 0, said
    records = read_records(conversations)
    settings = EvaluationConfig(batch_size=len(records), max_new_tokens=16)
    expected = answer_records(*LOADED, PROCESSOR, records, settings)
    answers = read(tmp_path / "answers.jsonl")
    assert [answer["answer"] for answer in answers] == [answer.text for answer in expected]
    assert len(answers) == 22 + 2 * len(PICTURES)

    found = json.loads((tmp_path / "scores.json").read_text())
    *kinds, overall = scores(expected)
    assert 0 < overall.accuracy < 1
    metric = found["metrics"]["exact_match"]
    assert (metric["count"], metric["score"]) == (overall.asked, overall.accuracy)
    by_kind = {name: (s["count"], s["score"]) for name, s in metric["categories"].items()}
    assert by_kind == {kind.kind: (kind.asked, kind.accuracy) for kind in kinds}
    assert (found["questions"], found["errors"], found["cut"]) == (len(answers), 0, 0)
    assert f"exact_match  all  {overall.asked}  {overall.accuracy:.1%}".split() in [
        line.split()[:4] for line in said.splitlines()
    ]

    page = Page(tmp_path / "report.html")
    assert page.inside["h1"] == f"{EXAMPLE / 'model'}: exact_match {overall.accuracy:.1%}"
    wrong = overall.asked - overall.right
    assert [item.kind for item in page.items] == ["wrong"] * wrong + ["right"] * overall.right
    first = next(answer for answer in expected if not answer.is_right)
    for text in (first.text, first.record.answer, first.record.kind):
        assert text in page.items[0].text


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Of every metric, one with a missing picture; beside a folder with the pictures."""
    image = f"pictures/{PICTURES[0].name}"
    ten = ["It is a 3."] * 2 + ["3"] * 8
    records = [
        {"id": "free", "question": ASKED[0], "image": image, "answer": "it is a 0!"},
        {"id": "ten", "question": ASKED[2], "image": image, "answers": ten},
        {"id": "letter", "question": ASKED[0], "image": image, "choices": ["1", "2"], "answer": 0},
        {"id": "missing", "question": ASKED[0], "image": "pictures/no.png", "answer": "1"},
        {"id": "text", "question": "What is 2 plus 3?", "answer": "2 plus 3 is five."},
    ]
    return write(tmp_path / "mixed.jsonl", records)


def test_every_metric_where_it_fits_errors_and_another_folder(
    mixed: Path, tmp_path: Path, command: Command
):
    output = tmp_path / "out"
    status, said = command(mixed, output, "--allow-folder", DEMO)
    assert status == 1, said  # a picture is missing
    found = json.loads((output / "scores.json").read_text())
    assert {name: metric["count"] for name, metric in found["metrics"].items()} == {
        "exact_match": 3,
        "vqa": 1,
        "multiple_choice": 1,
    }
    assert (found["questions"], found["errors"], found["unparsed"]) == (5, 1, 1)
    answers = {answer["id"]: answer for answer in read(output / "answers.jsonl")}
    assert list(answers) == ["free", "ten", "letter", "missing", "text"]
    assert answers["letter"]["scores"] == {"multiple_choice": 0}
    assert "letter" not in answers["letter"]
    assert answers["missing"]["scores"] == {"exact_match": 0}
    assert "no such file" in answers["missing"]["error"]
    assert answers["text"]["scores"] == {"exact_match": 1}
    assert Page(output / "report.html").items[-1].kind == "right"

    # Scored again by other metrics, the answers stay.
    before = (output / "results.jsonl").read_bytes()
    words = ("--allow-folder", DEMO, "--metric", "anls", "--metric", "relaxed_accuracy")
    status, said = command(mixed, output, *words)
    assert (status, (output / "results.jsonl").read_bytes()) == (1, before)
    assert "Every request has a result" in said
    found = json.loads((output / "scores.json").read_text())
    assert {name: metric["count"] for name, metric in found["metrics"].items()} == {
        "anls": 5,
        "relaxed_accuracy": 5,
    }
    [text] = [answer for answer in read(output / "answers.jsonl") if answer["id"] == "text"]
    assert text["scores"] == {"anls": pytest.approx(1 - 4 / 17), "relaxed_accuracy": 0}
    assert "partly" in [item.kind for item in Page(output / "report.html").items]


def test_carried_on(mixed: Path, tmp_path: Path, command: Command):
    words = ("--allow-folder", DEMO)
    command(mixed, tmp_path / "out", *words)
    results = tmp_path / "out" / "results.jsonl"
    expected = (tmp_path / "out" / "answers.jsonl").read_bytes()
    # As a process leaves it that was killed.
    results.write_bytes(results.read_bytes()[:1500])
    for name in ("scores.json", "answers.jsonl", "report.html"):
        (tmp_path / "out" / name).unlink()
    status, said = command(mixed, tmp_path / "out", *words)
    assert (status, "carrying on" in said) == (1, True)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == expected
    assert len(read(results)) == 5

    status, said = command(mixed, tmp_path / "out", *words, "--suffix", "Answer with a number.")
    assert status == 2
    assert 'suffix was "" and is now "Answer with a number."' in said


def test_what_is_refused(mixed: Path, tmp_path: Path, command: Command):
    for words, why in (
        (("--metric", "multiple_choice"), "needs 'choices', and the question 'free' has none"),
        (("--metric", "vqa"), "at least 4; the question 'free' has 1"),
        (("--allow-folder", tmp_path / "no"), "no such folder"),
        (("--max-tokens", 0), "--max-tokens 0: expected at least 1"),
    ):
        status, said = command(mixed, tmp_path / "out", *words)
        assert status == 2
        assert why in said
    mixed.write_text('{"question": "?"}\n')
    status, said = command(mixed, tmp_path / "out")
    assert (status, f"{mixed}:1: expected 'answer' or 'answers'" in said) == (2, True)
    assert not (tmp_path / "out").exists()


def answered(index: int, score: float, **changes: Any) -> Answered:
    values = {"id": f"#{index + 1}", "category": "all", "text": "x", "finish_reason": "stop"}
    return Answered(index, **{**values, "error": None, "scores": {"anls": score}, **changes})


def test_a_long_page_has_the_worst_and_some_that_are_right(tmp_path: Path):
    values = [1, 0, 0.6, 0, 1, 0.7, 1, 0, 1, 1]
    records = [{"question": "<b>?", "answer": f"<i>{i}"} for i in range(len(values))]
    questions = Questions(write(tmp_path / "questions.jsonl", records))
    answers = [answered(i, value) for i, value in enumerate(values)]
    answers[3] = answered(3, 0, text="", finish_reason=None, error="<u>broken")

    def shown(max_items: int) -> list[str]:
        write_page(
            tmp_path / "page.html",
            questions,
            answers,
            sources=PictureSources(),
            model_name="m",
            max_items=max_items,
        )
        page = Page(tmp_path / "page.html")
        assert page.inside["h1"] == "m: anls 63.0%"
        assert ("Here are" in page.inside["p"]) == (max_items < 10)
        return [item.text.partition("#")[2].partition("#")[0] for item in page.items]

    assert shown(10) == ["2", "4", "8", "3", "6", "1", "5", "7", "9", "10"]
    assert shown(7) == ["2", "4", "8", "3", "6", "1", "5"]
    assert shown(3) == ["2", "4", "8"]
    page = Page(tmp_path / "page.html")
    assert "<i>1" in page.items[0].text
    assert "<u>broken" in page.items[1].text


def test_intervals():
    """Wilson's, from the definition: means whose distance is 1.96 of their own deviations."""
    for right, count in ((0, 5), (3, 5), (5, 5), (95, 100), (1, 1)):
        answers = [answered(i, i < right) for i in range(count)]
        found = sum_up(answers)["anls"]["all"]
        assert (found.count, found.score) == (count, right / count)
        for mean in (found.low, found.high):
            deviation = np.sqrt(mean * (1 - mean) / count)
            assert abs(mean - found.score) == pytest.approx(1.959964 * deviation, abs=1e-7)
        assert 0 <= found.low <= found.score <= found.high <= 1
        assert found.low < found.high
    for number in (1, 0):
        categories = sum_up([answered(0, 1), answered(1, number, category="b")])["anls"]
        assert {name: s.score for name, s in categories.items()} == {
            "all": (1 + number) / 2,
            "b": number,
        }


def test_the_names_of_metrics_are_those_of_the_command():
    from typing import get_args

    from mllama_jax.cli.eval import Metric

    assert set(get_args(Metric)) == set(scoring.METRIC_NAMES)
