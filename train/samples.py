"""Held-out questions with their pictures and what the model says to them, as a page to look at."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.report_items import FOLDED_ANSWER, Item, Thumbnails
from mllama_jax.batch.report_page import FOOT, page_head, safe
from mllama_jax.train.data.pictures import Picture, readable
from mllama_jax.train.data.records import Record
from mllama_jax.train.evaluation import Answer
from mllama_jax.train.metrics import Numbers, replace_text


def write_samples(
    folder: epath.Path, step: int, answers: Sequence[Answer], numbers: Numbers
) -> epath.Path:
    """Writes a page that needs nothing else; an unreadable picture is a box that says why.

    Args:
        folder: of all pages.
        step: after which the model answered.
        answers: those that are shown.
        numbers: of the whole evaluation.

    Returns:
        Where the page is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    right = sum(answer.is_right for answer in answers)
    said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    kinds = {"right": f"right ({right})", "wrong": f"wrong ({len(answers) - right})"}
    page, thumbnails = io.StringIO(), Thumbnails(PictureSources())
    page.write(page_head(f"Held-out answers after step {step:,}", f"<p>{safe(said)}</p>\n", kinds))
    for number, answer in enumerate(answers, start=1):
        _item(number, answer, thumbnails).write(page, thumbnails)
    page.write(FOOT)
    file = folder / f"step_{step:08d}.html"
    replace_text(file, page.getvalue())
    return file


def _item(number: int, answer: Answer, thumbnails: Thumbnails) -> Item:
    record, kind = answer.record, "right" if answer.is_right else "wrong"
    item = Item(kind)
    item.add(
        f'<article id="r{number}" class="{kind}">\n'
        f'<h2><span dir="auto">{safe(record.where)}</span><a href="#r{number}">#{number}</a></h2>\n'
        f'<p class="note">{safe(record.kind)}</p>\n'
    )
    for what, value in _parts(record):
        if what == "picture":
            item.pieces.append(thumbnails.read(_source(value)))
        elif what == "role":
            item.add(f'<div class="role">{safe(value)}</div>\n')
        else:
            item.add_text(value, FOLDED_ANSWER)
    item.characters = 0  # A long question takes nothing from its answer.
    item.add('<div class="role">expected</div>\n')
    item.add_text(record.answer, FOLDED_ANSWER)
    item.add(f'<div class="role">answer, {kind}</div>\n<div class="reply">\n')
    item.add_text(answer.text, FOLDED_ANSWER)
    item.add("</div>\n</article>\n")
    return item


def _parts(record: Record) -> Iterator[tuple[str, Any]]:
    """What the question says, in order: each a "role", a "text" or a "picture"."""
    pictures = iter(record.images)
    for message in record.question:
        yield "role", message["role"]
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            is_picture = part["type"] == "image"
            yield ("picture", next(pictures)) if is_picture else ("text", part["text"])


def _source(picture: Picture) -> Any:
    """As something that is read whatever folder it is in: the data is the run's own."""
    found = readable(picture)
    return Path(found) if isinstance(found, str) and ":" not in found[:8] else found
