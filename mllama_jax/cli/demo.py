"""``mllama-jax demo``: the example model answers questions about pictures."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama_jax.cli.contact_sheet import Entry, contact_sheet

_EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"


@dataclass(frozen=True)
class _Question:
    """A line of the questions file: a conversation, and the answer that is right."""

    messages: list[dict[str, Any]]
    expected: str | None

    def parts(self, kind: str) -> Iterator[str]:
        """The images' paths, or the texts, of all messages."""
        for message in self.messages:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            yield from (part[kind] for part in content if part["type"] == kind)


def demo(
    model: Path = _EXAMPLE / "model",
    questions: Path = _EXAMPLE / "demo" / "questions.jsonl",
    output: Path = Path("demo_output"),
) -> None:
    """Answer a file of pictures and questions, print a table and draw a contact sheet.

    Without arguments: a model of under a million parameters, trained from scratch on handwritten
    digits, answers questions about digits that it has never seen.

    Args:
        model: Hugging Face folder of an instruct model.
        questions: JSON lines with "messages" (chat messages; paths of pictures are relative to the
            file) of which an assistant's last one, if there, is the expected answer.
        output: folder for contact_sheet.png.
    """
    asked = read_questions(questions)
    if not model.is_dir():
        raise FileNotFoundError(
            f"There is no model folder {str(model)!r}. The example model comes with the source "
            "tree; run the demo there (make demo), or give --model and --questions."
        )
    start = time.perf_counter()
    answers = _answer(model, asked)
    seconds = time.perf_counter() - start
    _print_table(asked, answers)
    known = [(q.expected, answer) for q, answer in zip(asked, answers, strict=True) if q.expected]
    right = sum(expected == answer for expected, answer in known)
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "contact_sheet.png"
    _draw(asked, answers).save(sheet)
    print(
        f"{right} of {len(known)} answers are right; {seconds:.0f} s with loading and compilation."
        f"\nPictures, questions and answers: {sheet}"
    )


def read_questions(file: Path) -> list[_Question]:
    """Reads a questions file; see `demo`.

    Raises:
        FileNotFoundError: there is no such file, or a picture is missing.
        ValueError: a line is no JSON object with messages, or there is no line at all.
    """
    if not file.exists():
        raise FileNotFoundError(f"There is no questions file {str(file)!r}.")
    questions = [
        _question(line, f"{file}, line {number}", file.parent)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.strip()
    ]
    if not questions:
        raise ValueError(f"{file}: no questions; expected one JSON object a line")
    return questions


def _question(line: str, where: str, folder: Path) -> _Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, Mapping) or not record.get("messages"):
        raise ValueError(f'{where}: expected an object with "messages", found {line[:60]!r}')
    messages = [_with_absolute_paths(message, folder) for message in record["messages"]]
    expected = None
    if messages[-1]["role"] == "assistant":
        expected = messages.pop()["content"]
    question = _Question(messages, expected)
    for path in question.parts("image"):
        if not Path(path).exists():
            raise FileNotFoundError(f"{where}: there is no picture {path!r}")
    return question


def _with_absolute_paths(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [
            {**part, "image": str(folder / part["image"])} if part["type"] == "image" else part
            for part in content
        ]
    return {**message, "content": content}


def _answer(folder: Path, questions: list[_Question]) -> list[str]:
    """All questions as one batch: any number of pictures each, and none beside some."""
    from mllama_jax import MllamaForConditionalGeneration, MllamaProcessor

    processor = MllamaProcessor.from_pretrained(folder)
    model, params = MllamaForConditionalGeneration.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [question.messages for question in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="np",
    )
    generated = model.generate(params, **inputs)
    new = generated.sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _print_table(questions: list[_Question], answers: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "pictures", "question", "answer", "expected")
    for question, answer in zip(questions, answers, strict=True):
        mark = {True: "[green]✓", False: "[red]✗"}[question.expected in (None, answer)]
        pictures = " ".join(Path(path).name for path in question.parts("image"))
        texts = " ".join(question.parts("text"))
        table.add_row(mark, pictures, texts, answer, question.expected or "")
    Console().print(table)


def _draw(questions: list[_Question], answers: list[str]) -> Any:
    from mllama_jax.processing.image_loading import load_image

    return contact_sheet(
        [
            Entry(
                [load_image(path) for path in question.parts("image")],
                " ".join(question.parts("text")),
                answer,
                question.expected,
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
    )
