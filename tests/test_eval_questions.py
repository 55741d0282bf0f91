"""Files of questions in all their forms, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mllama_jax.batch.inputs import Shard
from mllama_jax.batch.requests import SamplingOptions
from mllama_jax.evaluation.questions import Question, Questions
from mllama_jax.train.data.records import DataError


def write(folder: Path, *records: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def one(folder: Path, **options: Any) -> Any:
    """Reads a single question."""

    def read(**record: Any) -> Question:
        [question] = Questions(write(folder, record), **options)
        return question

    return read


def asked(question: Question) -> list[Any]:
    """The parts of the only message: texts as such, pictures by name."""
    [message] = question.messages
    assert message["role"] == "user"
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [
        part["text"] if part["type"] == "text" else {Path(part["image"]).name} for part in content
    ]


def test_columns(tmp_path: Path):
    read = one(tmp_path)
    question = read(question="Which?", image="a.png", answer="one", category="digits", id=7)
    assert (question.id, question.category) == ("7", "digits")
    assert question.references == ("one",)
    assert asked(question) == [{"a.png"}, "Which?"]
    assert question.messages[0]["content"][0]["image"] == str(tmp_path / "a.png")

    question = read(
        question="<image> or <image>?", images=["a.png", "b.png"], answers=["x", 2, 0.5]
    )
    assert (question.id, question.category) == ("#1", "all")
    assert question.references == ("x", "2", "0.5")
    assert asked(question) == [{"a.png"}, " or ", {"b.png"}, "?"]

    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(["a", "b", "a"])]
    assert read(question="Why?", answers=answers).references == ("a", "b", "a")
    assert asked(read(question="Why?", answers=answers, image=None)) == ["Why?"]


def test_choices(tmp_path: Path):
    read = one(tmp_path)
    choices = ["two", "three", "2"]
    question = read(question="How many?", image="a.png", choices=choices, answer="B")
    assert asked(question) == [{"a.png"}, "How many?\nA. two\nB. three\nC. 2"]
    assert question.references == ("B", "three")
    assert read(question="", choices=choices, answer="2").references == ("C", "2")
    assert read(question="", choices=choices, answer=2).references == ("C", "2")
    assert read(question="", choices=choices, answers=["two"]).references == ("A", "two")
    pictures = read(
        question="Which?", choices=["<image>", "<image>"], images=["a.png", "b.png"], answer="A"
    )
    assert asked(pictures) == ["Which?\nA. ", {"a.png"}, "B. ", {"b.png"}]


def test_conversations_with_a_suffix(tmp_path: Path):
    read = one(tmp_path, suffix="Be brief.")
    assert asked(read(question="Why?", answer="x")) == ["Why?\nBe brief."]
    assert asked(read(question="Why?", image="a.png", answer="x"))[1] == "Why?\nBe brief."
    assert asked(read(question="Why? <image>", image="a.png", answer="x"))[2] == "Be brief."
    conversation = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
    question = read(messages=conversation, kind="talk")
    assert (question.category, question.references) == ("talk", ("See you.",))
    *before, last = question.messages
    assert before == conversation[:3]
    assert last == {"role": "user", "content": "Bye\nBe brief."}


def test_other_files_and_pictures_in_them(tmp_path: Path):
    rows = [
        {"question": "Which?", "image": {"bytes": b"png", "path": None}, "answers": ["a", "b"]},
        {"question": "Why?", "image": None, "answers": ["c"]},
    ]
    file = tmp_path / "questions.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    questions = Questions(file, cache=str(tmp_path / "cache"))
    assert [question.references for question in questions] == [("a", "b"), ("c",)]
    assert questions.question(0).messages[0]["content"][0]["image"] == b"png"
    assert [entry.custom_id for entry in questions.entries()] == ["#1", "#2"]
    assert [questions.count(Shard(index, 2)) for index in range(2)] == [1, 1]


def test_as_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, {"id": "x", "question": "Which?", "image": "a.png", "answer": "one"})
    options = SamplingOptions(max_tokens=3, temperature=0.0)
    monkeypatch.chdir(tmp_path)
    questions = Questions("questions.jsonl", options)
    [entry] = questions.entries()
    request = questions.request(entry)
    assert (request.custom_id, request.kind, request.options) == ("x", "chat", options)
    assert request.messages == questions.question(0).messages
    assert request.messages[0]["content"][0]["image"] == str(tmp_path / "a.png")
    assert questions.folders == (tmp_path,)
    elsewhere = Questions("questions.jsonl", folder=tmp_path / "pictures")
    path = elsewhere.question(0).messages[0]["content"][0]["image"]
    assert path == str(tmp_path / "pictures" / "a.png")


def test_the_fingerprint_is_of_what_is_asked(tmp_path: Path):
    record = {"question": "Which?", "image": "a.png", "answer": "one"}
    first = Questions(write(tmp_path, record)).fingerprint
    for name, value, is_same in (
        ("answer", "two", True),
        ("category", "new", True),
        ("question", "Why?", False),
        ("image", "b.png", False),
        ("choices", ["one", "two"], False),
        ("id", "#2", False),
    ):
        changed = Questions(write(tmp_path, record | {name: value}))
        assert (changed.fingerprint == first) == is_same, name
    assert Questions(write(tmp_path, record), suffix="?").fingerprint != first


def test_all_problems_are_named_at_once(tmp_path: Path):
    good: dict[str, Any] = {"id": "good", "question": "?", "answer": "x"}
    choice: dict[str, Any] = {"question": "?", "choices": ["a", "B"]}
    cases = [
        (good, None),
        (good, "the id 'good' is that of "),
        ([1], "expected an object"),
        ({"id": "q", "answer": "x"}, "'question'; found id, answer"),
        ({**good, "messages": []}, "exactly one of the keys"),
        ({"question": "?"}, "expected 'answer' or 'answers', found neither"),
        ({"question": "?", "answer": "a", "answers": ["a"]}, "found both"),
        ({"question": "?", "answers": []}, "expected a text or a list of texts"),
        ({"question": "?", "answer": True}, "expected a text or a list of texts"),
        ({"question": 1, "answer": "a"}, "'question' is 1, expected a string"),
        ({"question": "?", "answer": "a", "id": ""}, "'id' is '', expected"),
        ({"question": "?", "answer": "a", "choices": ["a"]}, "'choices' is ['a'], expected 2 to"),
        ({"question": "?", "answer": "a", "choices": ["a", ""]}, "expected 2 to 26 texts"),
        ({**choice, "answer": "c"}, "is 'c', which means no choice; expected a letter of AB"),
        ({**choice, "answer": 2}, "is 2, which means no choice"),
        ({"question": "?", "choices": ["B", "c"], "answer": "B"}, "means both of A, B"),
        ({"question": "?", "image": "https://x/a.png", "answer": "a"}, "download it once"),
        ({"question": "<image>", "answer": "a"}, "1 <image> for 0 pictures"),
        ({"question": "\ud800", "answer": "a"}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected a question before it"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "choices": ["a", "b"]},
            "'choices' belongs to 'question'",
        ),
    ]
    file = write(tmp_path, *(record for record, _ in cases))
    with pytest.raises(DataError) as found:
        Questions(file)
    head, *lines = str(found.value).splitlines()
    assert head == "The questions can't be used:"
    expected = [(number, why) for number, (_, why) in enumerate(cases, 1) if why]
    assert len(lines) == len(expected) == 20
    for line, (number, why) in zip(lines, expected, strict=True):
        assert line.startswith(f"  {file}:{number}: ")
        assert why in line

    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        Questions(empty)
