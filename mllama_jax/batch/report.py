"""A batch job as one web page that needs nothing else: pictures, prompts, answers and errors."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.report_items import FOLDED_ANSWER, Item, Thumbnails, add_prompt
from mllama_jax.batch.report_page import FOOT, head, safe
from mllama_jax.batch.requests import Request

__all__ = ["write_report"]

Line = Mapping[str, Any]


def write_report(
    path: Path,
    lines: Iterable[tuple[Request | None, Line]],
    *,
    sources: PictureSources,
    model_name: str,
    max_items: int = 500,
) -> None:
    """Writes the page; until it is complete, an earlier one stays.

    Requests are not trusted: all they say is shown as text. Memory is that of a few items, however
    many lines there are.

    Args:
        path: of the page.
        lines: requests, None where they could not be read, with their lines of the results file.
        sources: where pictures may come from; they are read once more, and one that can't be is a
            grey box with the reason.
        model_name: whose answers they are.
        max_items: the first so many lines are shown, of which some are given up for answers or
            errors that come later where there are nearly none before.

    Raises:
        OSError: the page can't be written.
    """
    unfinished = path.with_name(f".{path.name}.incomplete")
    totals: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    thumbnails = Thumbnails(sources)
    try:
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as items,
            unfinished.open("w", encoding="utf-8") as page,
        ):
            for item in _chosen(lines, thumbnails, max_items, totals):
                shown[item.kind] += 1
                item.write(items, thumbnails)
            items.seek(0)
            page.write(head(model_name, totals, shown))
            shutil.copyfileobj(items, page)
            page.write(FOOT)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _chosen(
    lines: Iterable[tuple[Request | None, Line]],
    thumbnails: Thumbnails,
    max_items: int,
    totals: Counter[str],
) -> Iterator[Item]:
    """The first items, but a tenth of them of each kind, if there are so many; counts all."""
    few = -(-max_items // 10)
    kinds: Counter[str] = Counter()
    last: list[Item] = []  # in places that rare ones may still take
    for number, (request, line) in enumerate(lines, 1):
        kind = "answer" if _choices(line) else "error"
        totals[kind] += 1
        usage = _dict(_body(line).get("usage"))
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name)
            totals[name] += count if isinstance(count, int) else 0
        if kinds.total() >= max_items:
            others = [item for item in last if item.kind != kind]
            if not others or kinds[kind] >= few:
                continue
            last.remove(others[-1])
            kinds[others[-1].kind] -= 1
        item = _item(number, kind, request, line, thumbnails)
        kinds[kind] += 1
        if kinds.total() <= max_items - few:
            yield item
        else:
            last.append(item)
    yield from last


def _item(
    number: int, kind: str, request: Request | None, line: Line, thumbnails: Thumbnails
) -> Item:
    item = Item(kind)
    custom_id = line.get("custom_id")
    name = "(no custom_id)" if custom_id is None else str(custom_id)
    item.add(
        f'<article id="r{number}" class="{kind}">\n'
        f'<h2><span dir="auto">{safe(name)}</span><a href="#r{number}">#{number}</a></h2>\n'
    )
    if request is None:
        item.add('<p class="note">The request could not be read.</p>\n')
    else:
        add_prompt(item, request, thumbnails)
        item.characters = 0  # A long prompt takes nothing from what became of it.
    _add_error(item, line) if kind == "error" else _add_answers(item, line)
    item.add("</article>\n")
    return item


def _add_answers(item: Item, line: Line) -> None:
    choices = _choices(line)
    for choice in choices:
        text = _dict(choice.get("message")).get("content", choice.get("text"))
        item.add('<div class="reply">\n')
        item.add_text(str(text or ""), FOLDED_ANSWER)
        reason = str(choice.get("finish_reason"))
        cut = ' class="cut"' if reason == "length" else ""
        stop = choice.get("stop_reason")
        by = "" if stop is None else f" ({str(stop)[:100]!r})"
        index = f"{choice.get('index')}: " if len(choices) > 1 else ""
        item.add(
            f'<div class="note">{safe(index)}<span{cut}>{safe(reason + by)}</span></div>\n</div>\n'
        )
    usage = _dict(_body(line).get("usage"))
    tokens = f"{usage.get('prompt_tokens')} tokens in, {usage.get('completion_tokens')} out"
    item.add(f'<div class="note">{safe(tokens)}</div>\n')


def _add_error(item: Item, line: Line) -> None:
    error = line.get("error") or _body(line).get("error")
    details = _dict(error)
    status = _dict(line.get("response")).get("status_code")
    where = f", {details['param']}" if details.get("param") else ""
    item.add(f'<div class="reply"><div class="note">{safe(f"error {status}{where}")}</div>\n')
    item.add('<div class="message">')
    item.add_text(str(details.get("message") or error), FOLDED_ANSWER)
    item.add("</div></div>\n")


def _body(line: Line) -> Line:
    return _dict(_dict(line.get("response")).get("body"))


def _choices(line: Line) -> list[Line]:
    """Of an answer; none of an error."""
    choices = _body(line).get("choices") if line.get("error") is None else None
    return [_dict(choice) for choice in choices] if isinstance(choices, list) else []


def _dict(value: Any) -> Line:
    return value if isinstance(value, Mapping) else {}
