"""The page of a batch job: real answers are on it, and what requests say stays text."""

import base64
import hashlib
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from asking import EXAMPLE, GREEDY, OPTIONS, PICTURES, PROCESSOR, ask, make_engine
from PIL import Image

from mllama_jax.batch import report_items
from mllama_jax.batch.answers import Failure
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.report import write_report
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.batch.responses import error_line, response_line
from mllama_jax.batch.summary import Summary

SOURCES = PictureSources((EXAMPLE / "demo" / "pictures",))
VOID = {"meta", "input", "img"}
EVIL = (
    "</div></article></script></style><script>alert(1)</script><img src=x onerror=alert(1)>"
    '" onload="alert(1)" x=\'y\' `z` <!-- <![CDATA[ &lt;b&gt; &#60; javascript:alert(1) {{}} '
)


@dataclass
class Item:
    kind: str
    text: str = ""
    pictures: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it must be."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.shape: list[tuple[str, ...]] = []
        self.items: list[Item] = []
        self.inside: dict[str, str] = {"h1": "", "p": "", "script": "", "style": "", "title": ""}
        self.urls: dict[str, str] = {}
        self.policy = ""
        source = path.read_text(encoding="utf-8")
        assert source.startswith("<!DOCTYPE html>\n")
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert len(named) == len(attrs)
        self.shape.append((tag, *named))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.items.append(Item(str(named["class"])))
            assert named["id"] == re.sub(r"\D*", "r", str(named["id"]), count=1)
        if "http-equiv" in named:
            self.policy = str(named["content"])
        if tag == "img":
            self._picture(named)
        if tag == "a":
            assert re.fullmatch(r"#r\d+", str(named["href"]))

    def _picture(self, named: dict[str, str | None]) -> None:
        name = named.get("data-copy-of")
        if name is None:
            name, url = str(named["id"]), str(named["src"])
            head, _, body = url.partition(",")
            assert head == "data:image/jpeg;base64"
            assert base64.b64decode(body, validate=True)[:3] == b"\xff\xd8\xff"
            assert url not in self.urls.values()
            assert name not in self.urls
            self.urls[name] = url
        assert name in self.urls
        self.items[-1].pictures.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] += data
        if "article" in self.open:
            self.items[-1].text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def written(path: Path, lines: Any, **changes: Any) -> Page:
    write_report(path, lines, **{"sources": SOURCES, "model_name": "digits"} | changes)
    return Page(path)


def answer_line(name: str = "a", text: str = "It is a 3.", **choice: Any) -> dict[str, Any]:
    choices = [{"index": 0, "message": {"content": text}, "finish_reason": "stop"} | choice]
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    body = {"choices": choices, "usage": usage}
    return {"custom_id": name, "response": {"status_code": 200, "body": body}, "error": None}


def with_pictures(*sources: Any) -> Request:
    parts = [{"type": "image", "image": source} for source in sources]
    return Request("a", "chat", ({"role": "user", "content": parts},))


def numbered(kinds: str) -> Iterator[tuple[Request, dict[str, Any]]]:
    """A line for each letter: an answer or an error."""
    for number, kind in enumerate(kinds):
        name = f"name{number}."
        line = answer_line(name) if kind == "a" else error_line(name, RequestError("no"))
        yield Request(name, "completion", prompt="b"), line


def test_a_real_job(tmp_path: Path):
    engine = make_engine(prompt_lengths=(32,), max_length=96)
    requests = [
        ask("three", "Which digit is this?", 0),
        ask("both", "Which digits are these?", 1, 0, n=2, temperature=2.0, seed=1),
        ask("cut", "Which digit is this?", 1, max_tokens=2),
        ask("long", "Which digit is this? " * 90),
        Request("raw", "completion", prompt="Which?", images=(PICTURES[2].name,), options=GREEDY),
    ]
    assert OPTIONS.num_slots < len(requests)
    by_name = {request.custom_id: request for request in requests}
    summary = Summary(skipped=0)
    lines, texts = [], {}
    for result in engine.run(iter(requests)):
        summary.add(result)
        if isinstance(result, Failure):
            line = error_line(result.custom_id, result.error)
        else:
            line = response_line(
                result, model_name="digits", tokenizer=PROCESSOR.tokenizer, created=0
            )
            texts[line["custom_id"]] = [choice.text for choice in result.choices]
        lines.append((by_name[line["custom_id"]], line))

    said = summary.text(engine.stats)
    assert said.startswith("4 answered, 1 failed.\n  1 × status 400, messages: the prompt has more")
    assert f"{engine.stats.tokens_out} out" in said
    assert f"Pictures  3 encoded, {engine.stats.pictures_reused} reused" in said
    assert "nan" not in said

    page = written(tmp_path / "report.html", lines)
    assert page.inside["h1"] == "digits: 4 answers, 1 error"
    found = dict(zip([line["custom_id"] for _, line in lines], page.items, strict=True))
    assert len(page.urls) == 3
    assert found["both"].pictures[1] == found["three"].pictures[0]
    for name, choices in texts.items():
        assert found[name].kind == "answer"
        assert all(choice in found[name].text for choice in choices)
    assert len(texts["both"]) == 2
    assert "length" in found["cut"].text
    assert " tokens in, 2 out" in found["cut"].text
    assert PICTURES[0].name in found["three"].text
    assert found["long"].kind == "error"
    assert "the prompt has more than" in found["long"].text
    assert "Which digit is this? " * 90 in found["long"].text


def test_the_page_is_its_own_and_its_policy_lets_nothing_else_in(tmp_path: Path):
    page = written(tmp_path / "page.html", numbered("ae"))
    for name in ("style", "script"):
        digest = hashlib.sha256(page.inside[name].encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}'" in page.policy
    assert "default-src 'none'; img-src data:;" in page.policy
    assert not re.search(r"https?:|@import|url\(", page.inside["style"] + page.inside["script"])
    assert [shape[0] for shape in page.shape].count("script") == 1


def test_what_requests_say_stays_text(tmp_path: Path):
    def lines(evil: str) -> Iterator[tuple[Request, dict[str, Any]]]:
        picture = tmp_path / evil[-90:].replace("/", "")
        Image.new("RGB", (2, 2)).save(picture, "PNG")
        parts = [
            {"type": "text", "text": evil},
            {"type": "image", "image": picture},
            {"type": "image", "image": evil},
            {"type": "image", "image": f"data:image/png{evil},{evil}"},
            {"type": "image", "image": f"https://{evil}"},
        ]
        chat = Request(evil, "chat", ({"role": evil, "content": parts},))
        answer = answer_line(evil, evil, finish_reason=evil, stop_reason=evil, index=evil)
        answer["response"]["body"]["choices"] *= 2
        yield chat, answer
        raw = Request(evil, "completion", prompt=evil, images=(Path(evil),))
        error = RequestError(evil, field=evil)
        yield raw, error_line(evil, error)
        yield chat, error_line(evil, error) | {"error": evil}

    evil = written(tmp_path / "evil.html", lines(EVIL), model_name=EVIL)
    good = written(tmp_path / "good.html", lines("harmless"), model_name="harmless")
    assert evil.shape == good.shape
    assert evil.inside["script"] == good.inside["script"]
    assert evil.inside["title"] == f"{EVIL}: 1 answer, 2 errors"
    for item, times in zip(evil.items, (10, 4, 4), strict=True):
        assert item.text.count(EVIL) >= times


def test_texts_that_no_file_can_hold(tmp_path: Path):
    text = "half \ud83d of \udc00 a pair, \x00 \x07 \x1b[31m \x9b \ufffe, whole: 😀 é \u202e\t\r\n."
    request = Request(text, "completion", prompt=text, images=(text,))
    [item] = written(tmp_path / "page.html", [(request, answer_line(text, text))]).items
    expected = "half � of � a pair, � � �[31m � �, whole: 😀 é \u202e\t"
    assert item.text.count(expected) == 4
    assert not re.search("[\ud800-\udfff\x00-\x08\x0b-\x0c\x0e-\x1f]", item.text)


def test_pictures_that_cannot_be_shown(tmp_path: Path):
    folder = tmp_path / "open"
    folder.mkdir()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (folder / "broken.png").write_bytes(secret.read_bytes()[:40])
    (folder / "link.png").symlink_to(secret)
    Image.new("RGB", (3000, 10), "red").save(folder / "wide.png")
    mine = Image.new("RGB", (900, 600))
    inline = (
        f"data:image/png;base64,{base64.b64encode((folder / 'wide.png').read_bytes()).decode()}"
    )
    request = with_pictures(
        "broken.png", str(secret), "link.png", "http://127.0.0.1:9/", None, "wide.png", inline, mine
    )
    lines = [(request, answer_line()), (None, error_line(None, RequestError("line 7: no JSON")))]
    sources = PictureSources((folder,))
    item, unread = written(tmp_path / "page.html", lines, sources=sources).items
    assert item.pictures == ["p0", "p0", "p1"]
    assert "not a picture in a format that Pillow reads" in item.text
    assert item.text.count("lies outside of") == 2
    assert "nothing is downloaded" in item.text
    assert "expected a Pillow image" in item.text
    assert mine.size == (900, 600)
    assert unread.text.split("\n")[1:3] == ["(no custom_id)#2", "The request could not be read."]
    assert "line 7: no JSON" in unread.text


def test_the_time_for_remote_pictures_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_items, "_SECONDS_TO_FETCH", 1e-6)
    request = with_pictures("http://127.0.0.1:9/a.png", "HTTP://127.0.0.1:9/b.png")
    sources = PictureSources(allow_remote=True)
    [item] = written(tmp_path / "page.html", [(request, answer_line())], sources=sources).items
    assert item.text.count("it can't be fetched") == 1
    assert item.text.count("not fetched once more") == 1


@pytest.mark.parametrize(
    ("kinds", "shown", "left_out"),
    [
        ("a" * 20, range(20), ""),
        ("a" * 21, range(20), "1 answer and 0 errors are left out"),
        ("a" * 50 + "eee" + "a" * 50, [*range(18), 50, 51], "82 answers and 1 error are"),
        ("e" * 50 + "a" + "e" * 50, [*range(19), 50], "0 answers and 81 errors are"),
        ("ae" * 50, range(20), "40 answers and 40 errors are"),
        ("", [], ""),
    ],
)
def test_some_of_each_kind_are_shown(tmp_path: Path, kinds: str, shown: list[int], left_out: str):
    page = written(tmp_path / "page.html", numbered(kinds), max_items=20)
    names = [re.findall(r"name(\d+)\.", item.text)[0] for item in page.items]
    assert [int(name) for name in names] == list(shown)
    assert left_out in page.inside["p"]
    assert ("left out" in page.inside["p"]) == bool(left_out)
    assert [item.kind[0] for item in page.items] == [kinds[number] for number in shown]
    answers, errors = kinds.count("a"), kinds.count("e")
    assert page.inside["h1"] == f"digits: {answers} answer{'s' * (answers != 1)}, {errors} errors"
    assert f"{10 * answers:,} tokens in, {2 * answers} out." in page.inside["p"]


def test_memory_is_that_of_a_few_items(tmp_path: Path):
    def lines() -> Iterator[tuple[Request, dict[str, Any]]]:
        for i in range(400):
            text = f"{i:08d}" * 2**14
            contents = [[{"type": "text", "text": text}], *([[]] * 300), text]
            messages = tuple({"role": "user", "content": content} for content in contents)
            yield replace(with_pictures(), messages=messages), answer_line(text=text)

    tracemalloc.start()
    try:
        page = written(tmp_path / "page.html", lines(), max_items=100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size < 100 * 60_000
    assert peak < 30e6
    assert "… and 111,072 more characters" in page.items[0].text
    assert "… and 104 more parts" in page.items[0].text


def test_an_earlier_page_stays_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def broken() -> Iterator[tuple[Request, dict[str, Any]]]:
        yield from numbered("aa")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        written(path, broken())
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_of_another_make(tmp_path: Path):
    """A results file may have been edited, or written by another program."""
    lines = [
        {},
        {"response": None, "error": "out of memory"},
        {
            "response": {
                "body": {"choices": [None, {"text": None}], "usage": {"prompt_tokens": "?"}}
            }
        },
        {"custom_id": 7, "response": {"status_code": 500, "body": []}, "error": {"code": 3}},
    ]
    page = written(tmp_path / "page.html", [(None, line) for line in lines])
    assert [item.kind for item in page.items] == ["error", "error", "answer", "error"]
    assert "out of memory" in page.items[1].text
    assert "7#4" in page.items[3].text
