"""From requests to numbers: pictures stay confined, and nothing differs from the processor."""

import base64
import io
import json
import os
import random
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllama_jax import MllamaProcessor
from mllama_jax.batch import pictures
from mllama_jax.batch.answers import Answer, Choice, Timings, TokenLogprob
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.prepare import PreparedRequest, prepare
from mllama_jax.batch.requests import Request, RequestError, SamplingOptions, parse_record
from mllama_jax.batch.responses import error_line, response_line, token_bytes, token_text
from mllama_jax.processing.prompt_images import cross_attention_mask

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
DATE = "26 Jul 2024"


def encoded(size=(9, 7), colour=(200, 30, 60), format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def folder(tmp_path):
    """An open folder beside one that is not."""
    for name in ("open", "open/sub", "open-too", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a b.png").write_bytes(encoded())
    return tmp_path


def refused(sources, source):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked by callers
        sources.read(source)
    return str(caught.value)


# --- where pictures may come from -----------------------------------------------------------------


def test_files_of_open_folders(folder):
    sources = PictureSources((folder / "open", folder / "closed" / ".." / "open-too"))
    (folder / "open" / "link.png").symlink_to("sub/a b.png")
    for source in (
        *("a b.png", "sub/a b.png", "sub/../a b.png", "link.png"),
        *(f"{folder}/open/a b.png", f"{folder}/open-too/a b.png", "../open-too/a b.png"),
        *(f"file://{folder}/open/a%20b.png", f"FILE://localhost{folder}/open/sub/a%20b.png"),
    ):
        assert sources.read(source) == encoded(), source


def test_no_way_out_of_the_open_folders(folder):
    sources = PictureSources((folder / "open",))
    (folder / "open" / "file-link.png").symlink_to(folder / "closed" / "a b.png")
    (folder / "open" / "folder-link").symlink_to(folder / "closed")
    closed = f"{folder}/closed/a b.png"
    for source in (
        *("../closed/a b.png", "sub/../../closed/a b.png", closed, "/etc/passwd", "../open-too"),
        *("file-link.png", "folder-link/a b.png", "folder-link/../closed/a b.png"),
        *(f"file://{folder}/closed/a%20b.png", f"file://{folder}/open/%2e%2e/closed/a%20b.png"),
        *(f"file://{folder}/open/..%2fclosed%2Fa%20b.png", f"{folder}/open-too/a b.png"),
        *("..", "../closed/none.png", "file:///etc/passwd"),
    ):
        words = refused(sources, source)
        assert "outside" in words, source
        assert str(folder / "open") in words
        assert "--allow-folder" in words


def test_sources_that_are_no_files(folder):
    sources = PictureSources((folder / "open",))
    os.mkfifo(folder / "open" / "pipe")
    (folder / "open" / "loop").symlink_to("loop")
    (folder / "open" / "shut.png").write_bytes(b"")
    for source, words in (
        ("none.png", "no such file"),
        ("sub", "it is no file"),
        ("", "it is no file"),
        ("pipe", "it is no file"),
        ("loop", "not a usable path"),
        ("a\0b.png", "not a usable path"),
        ("x" * 5000, "it can't be read"),
        ("a b.png/c.png", "it can't be read"),
        ("file://host/a.png", "on this machine"),
        ("file://[/a.png", "not a usable URL"),
        ("file:a.png", "on this machine"),
        (f"file://{folder}/open/a%20b.png?x", "%3F"),
        ("gs://bucket/a.png", "nothing reads gs://"),
        ("https://example.com/a.png", "--allow-remote"),
        ("HTTP://example.com/a.png", "--allow-remote"),
        ("data:image/png,xx", "expected data:image/png;base64"),
        ("data:text/plain;base64,AAAA", "expected data:image/png;base64"),
        ("data:image/png;base64", "expected data:image/png;base64"),
        ("data:image/png;base64,A", "base64 is broken"),
        ("data:image/png;base64,AA==*", "base64 is broken"),
        ("data:image/png;base64,é", "base64 is broken"),
        ("data:image/png;base64,%ff", "base64 is broken"),
    ):
        found = refused(sources, source)
        assert words in found, (source, found)
        assert len(found) < 600
    assert "no folder is open" in refused(PictureSources(), "a.png")
    assert sources.read("shut.png") == b""


def test_data_urls():
    data = encoded()
    text = base64.b64encode(data).decode()
    for url in (
        data_url(data),
        data_url(data, "IMAGE/svg+xml"),
        f"data:image/png;name=a.png;base64,{text}",
        f"data:image/*;base64,{text[:20]}\n{text[20:]}",
        "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ):
        assert PictureSources().read(url) == data


def test_pictures_of_too_many_bytes(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 1000)
    sources = PictureSources((folder,))
    (folder / "big.png").write_bytes(b"x" * 1001)
    (folder / "fits.png").write_bytes(b"x" * 1000)
    assert len(sources.read("fits.png")) == 1000
    for source in ("big.png", data_url(b"x" * 1001), data_url(b"x" * 5000)):
        assert "too large; a picture may have 1000 bytes" in refused(sources, source)


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        to_file = self.path == "/to-file"
        if to_file or self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname" if to_file else "/a.png")
            self.end_headers()
            return
        status = 404 if self.path == "/none" else 200
        body = b"x" * 5000 if self.path == "/big" else encoded()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 10 * (self.path == "/cut")))
        self.end_headers()
        if self.path == "/drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.over.wait(0.02):
                    return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_remote_pictures_where_they_are_allowed(address, monkeypatch):
    sources = PictureSources(allow_remote=True)
    assert sources.read(f"{address}/a.png") == encoded()
    assert sources.read(f"{address}/moved") == encoded()
    assert "404" in refused(sources, f"{address}/none")
    assert "it can't be fetched" in refused(sources, f"{address}/to-file")
    assert "10 bytes before its end" in refused(sources, f"{address}/cut")
    for source in ("http://", "http://127.0.0.1:1/a", "http://127.0.0.1:99999/", "http://a b/\n"):
        assert "it can't be fetched" in refused(sources, source)
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 1000)
    assert "too large" in refused(sources, f"{address}/big")
    monkeypatch.setattr(pictures, "SECONDS_TO_FETCH", 0.2)
    assert "not complete after 0.2 seconds" in refused(sources, f"{address}/drip")


# --- prepared requests ----------------------------------------------------------------------------


def request(url, body):
    return parse_record({"custom_id": "one", "method": "POST", "url": url, "body": body})


def chat(messages, **body):
    return request("/v1/chat/completions", {"messages": messages, **body})


def completion(prompt, **body):
    return request("/v1/completions", {"prompt": prompt, **body})


def image(source):
    return {"type": "image_url", "image_url": {"url": source}}


def text(words):
    return {"type": "text", "text": words}


def prepared(request, processor, sources=None, max_length=4096, max_tiles=64):
    sources = PictureSources() if sources is None else sources
    sizes = {"max_length": max_length, "max_tiles": max_tiles}
    return prepare(request, processor, sources, **sizes, date_string=DATE)


def assert_same(found: PreparedRequest, features):
    """What was prepared, put together again, is what the processor returns."""
    assert found.input_ids.dtype == np.int32
    np.testing.assert_array_equal(found.input_ids, features["input_ids"][0])
    assert "pixel_values" in features or not found.pictures
    if not found.pictures:
        assert found.spans == ()
        return
    whole = features["pixel_values"][0]
    for picture, tiles in zip(found.pictures, whole, strict=True):
        np.testing.assert_array_equal(picture.pixel_values, tiles[: picture.num_tiles])
        assert picture.pixel_values.base is None  # the empty tiles' memory is free
    ids = [picture.aspect_ratio_id for picture in found.pictures]
    assert ids == features["aspect_ratio_ids"][0].tolist()
    num_tiles = [picture.num_tiles for picture in found.pictures]
    assert num_tiles == features["aspect_ratio_mask"][0].sum(-1).tolist()
    shape = (1, len(found.input_ids), *whole.shape[:2])
    mask = cross_attention_mask([found.spans], [num_tiles], shape)
    np.testing.assert_array_equal(mask, features["cross_attention_mask"])


def test_chats_of_the_example_equal_the_processor():
    processor = MllamaProcessor.from_pretrained(DIGITS / "model")
    sources = PictureSources((DIGITS / "demo",))
    lines = (DIGITS / "demo" / "questions.jsonl").read_text().splitlines()
    counts = set()
    for line in lines:
        messages = json.loads(line)["messages"][:1]
        found = prepared(chat(messages), processor, sources)
        counts.add(len(found.pictures))
        paths = [DIGITS / "demo" / part["image"] for part in parts_of(messages) if "image" in part]
        features = processor(
            images=[paths] if paths else None,
            text=[processor.apply_chat_template(messages, add_generation_prompt=True)],
            return_tensors="np",
        )
        assert_same(found, features)
    assert counts >= {1, 2}


def parts_of(messages):
    content = messages[0]["content"]
    return content if isinstance(content, list) else []


def test_pictures_between_turns(processor, folder):
    (folder / "wide.jpg").write_bytes(encoded((90, 20), format="JPEG"))
    square = data_url(encoded((20, 20)))
    messages = [
        {"role": "user", "content": [image("wide.jpg"), image(square), text("Which is wider?")]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [text("And this one? <|image|><|eot_id|>"), image("wide.jpg")]},
    ]
    found = prepared(chat(messages), processor, PictureSources((folder,)))
    wide = Image.open(folder / "wide.jpg")
    features = processor(
        images=[[wide, Image.open(io.BytesIO(encoded((20, 20)))), wide]],
        text=[
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|><|image|>"
            "Which is wider?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nThe first."
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd this one? "
            + processor.tokenizer.escape_special_tokens("<|image|><|eot_id|>")
            + "<|image|><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ],
        return_tensors="np",
    )
    assert_same(found, features)
    assert found.pictures[0].key == found.pictures[2].key != found.pictures[1].key
    assert [picture.num_tiles for picture in found.pictures] == [4, 1, 4]
    bos = processor.tokenizer.bos_token_id
    assert found.input_ids.tolist().count(bos) == 1


def test_a_key_is_the_content(processor, folder):
    (folder / "copy.png").write_bytes(encoded())
    (folder / "other.bmp").write_bytes(encoded(format="BMP"))
    (folder / "redder.png").write_bytes(encoded(colour=(201, 30, 60)))
    parts = [image(name) for name in ("open/a b.png", "copy.png", "other.bmp", "redder.png")]
    parts += [image(data_url(encoded())), image(data_url(encoded((7, 9))))]
    found = prepared(
        chat([{"role": "user", "content": parts}]), processor, PictureSources((folder,))
    )
    keys = [picture.key for picture in found.pictures]
    assert keys[0] == keys[1] == keys[2] == keys[4]
    assert len(set(keys)) == 3
    # The same four tiles side by side and on top of each other, and with another last tile.
    wide = Image.new("RGB", (112, 28), "red")
    other = wide.copy()
    other.paste("blue", (100, 10, 112, 28))
    shapes = [wide, wide.transpose(Image.Transpose.ROTATE_90), other]
    found = prepared(Request("one", "completion", prompt="", images=tuple(shapes)), processor)
    np.testing.assert_array_equal(found.pictures[0].pixel_values, found.pictures[1].pixel_values)
    np.testing.assert_array_equal(
        found.pictures[0].pixel_values[:3], found.pictures[2].pixel_values[:3]
    )
    assert len({picture.key for picture in found.pictures}) == 3


def count_reads(monkeypatch):
    read, sources = [], PictureSources.read

    def counted(self, source):
        read.append(source)
        return sources(self, source)

    monkeypatch.setattr(PictureSources, "read", counted)
    return read


def test_pictures_are_only_read_as_far_as_there_is_room(processor, folder, monkeypatch):
    read = count_reads(monkeypatch)
    sources = PictureSources((folder,))

    def asked(*names):
        return chat([{"role": "user", "content": [image(name) for name in names]}])

    with pytest.raises(RequestError, match="at least 4000 tiles together, more than the 8") as why:
        prepared(asked(*["open/a b.png"] * 4000), processor, sources, 8192, max_tiles=8)
    assert (why.value.field, why.value.custom_id, read) == ("messages", "one", [])
    with pytest.raises(RequestError, match=r"neither|images|at least 9 tiles") as why:
        prepared(completion("", images=["a"] * 9), processor, sources, max_tiles=8)
    assert (why.value.field, read) == ("images", [])

    names = [f"wide{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded((112, 28), colour=(i, 0, 0)))
    with pytest.raises(RequestError, match="at least 12 tiles together, more than the 11"):
        prepared(asked(*names), processor, sources, max_tiles=11)
    assert read == names[:3]


def test_a_picture_that_is_named_again_is_read_once(processor, folder, monkeypatch):
    read = count_reads(monkeypatch)
    parts = [image(name) for name in ("open/a b.png", data_url(encoded()), "open/a b.png")]
    sources = PictureSources((folder,))
    found = prepared(chat([{"role": "user", "content": parts}]), processor, sources)
    assert len(read) == 2
    assert found.pictures[0] is found.pictures[2]
    assert found.num_bytes == sum(p.pixel_values.nbytes for p in found.pictures[:2])
    assert found.without_pixels().num_bytes == 0
    assert [p.num_tiles for p in found.without_pixels().pictures] == [1, 1, 1]


def test_how_a_chat_ends(processor):
    messages = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One, two"},
    ]

    def ending(**flags):
        ids = prepared(chat(messages, **flags), processor).input_ids
        return processor.decode(ids).rpartition("One, two")[2]

    assert ending() == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert ending(add_generation_prompt=False) == "<|eot_id|>"
    assert ending(continue_final_message=True) == ""


def test_raw_prompts(processor, folder):
    sources = PictureSources((folder / "open",))
    bos, token = processor.tokenizer.bos_token_id, processor.image_token_id
    paths = ["a b.png", "sub/a b.png"]
    opened = [[Image.open(folder / "open" / path) for path in paths]]
    for prompt, same in (
        ("Two:", "<|image|><|image|><|begin_of_text|>Two:"),
        ("<|begin_of_text|><|image|>a<|image|>b<|eot_id|>",) * 2,
        ("<|image|><|image|>a", "<|image|><|image|><|begin_of_text|>a"),
    ):
        features = processor(images=opened, text=[same], return_tensors="np")
        assert_same(prepared(completion(prompt, images=paths), processor, sources), features)
    ids = [bos, *processor.tokenizer.encode("Two words")]
    assert prepared(completion(ids), processor).input_ids.tolist() == ids
    found = prepared(completion(ids, images=paths), processor, sources)
    assert found.input_ids.tolist() == [token, token, *ids]
    assert found.spans == ((0, len(ids) + 2), (1, len(ids) + 2))
    assert prepared(completion(""), processor).input_ids.tolist() == [bos]


def test_python_may_give_pictures_themselves(processor):
    picture = Image.open(io.BytesIO(encoded()))
    for source in (picture, np.asarray(picture), encoded()):
        message = {"role": "user", "content": [{"type": "image", "image": source}]}
        found = prepared(Request("one", "chat", messages=(message,)), processor)
        assert found.pictures[0].key == prepared(
            completion("", images=[data_url(encoded())]), processor
        ).pictures[0].key  # fmt: skip


def failure(request, processor, sources=None, **options):
    with pytest.raises(RequestError) as caught:
        prepared(request, processor, sources, **options)
    assert caught.value.status_code == 400
    assert caught.value.custom_id == "one"
    return caught.value


def test_a_prompt_that_does_not_fit(processor):
    request = completion([1] * 50)
    assert len(prepared(request, processor, max_length=51).input_ids) == 50
    error = failure(request, processor, max_length=50)
    assert "the prompt has 50 tokens" in str(error)
    assert "max_length is 50" in str(error)
    # Spaces go 128 to a token: many characters may be few tokens.
    request = completion("x" + " " * 2000 + "y")
    length = len(prepared(request, processor).input_ids)
    assert len(prepared(request, processor, max_length=length + 1).input_ids) == length < 2000 / 8
    # What is far too long is not encoded as a whole.
    with_end = [{"role": "user", "content": [text("a b " * 2**21), text("<" * 2**20)]}]
    assert "more than" in str(failure(chat(with_end), processor, max_length=1000))
    # Long before any picture is looked at.
    error = failure(completion("many words " * 50, images=["none.png"]), processor, max_length=50)
    assert "does not exist" not in str(error)
    assert "tokens" in str(error)


def test_broken_pictures_are_named(processor, folder):
    header = encoded()
    noise = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "text.png").write_bytes(b"not a picture")
    (folder / "empty.png").write_bytes(b"")
    # A few bytes that claim to be 100,000 pixels wide and high.
    claim = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + header[24:29]
    checksum = zlib.crc32(claim).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(header[:12] + claim + checksum + header[33:])
    sources = PictureSources((folder,))
    for name, words in (
        ("cut.png", "truncated or damaged"),
        ("text.png", "not a picture"),
        ("empty.png", "it is empty"),
        ("huge.png", "too large"),
        ("none.png", "no such file"),
        ("../x.png", "outside"),
    ):
        parts = [image("open/a b.png"), text("?"), image(name)]
        messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": parts}]
        error = failure(chat(messages), processor, sources)
        assert error.field == "messages[1].content[2]"
        assert "messages[1].content[2]" in str(error)
        assert name in str(error)
        assert words in str(error)
        error = failure(completion("", images=["open/a b.png", name]), processor, sources)
        assert error.field == "images[1]"


def test_damaged_pictures_end_in_errors_or_pictures(processor):
    rng = random.Random(2)
    originals = [encoded((40, 30), format=kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")]
    outcomes = {PreparedRequest: 0, RequestError: 0}
    for _ in range(120):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            outcome = prepared(completion("", images=[data_url(bytes(data))]), processor)
        except RequestError as error:
            outcome = error
        outcomes[type(outcome)] += 1
    assert min(outcomes.values()) > 20


def test_pictures_and_their_tokens_must_match(processor):
    picture = data_url(encoded())
    error = failure(completion("<|image|>a<|image|>", images=[picture]), processor)
    assert "2 image tokens (<|image|>) for 1 pictures" in str(error)
    error = failure(completion([processor.image_token_id]), processor)
    assert "1 image tokens" in str(error)
    # The template writes what a tool returned as JSON, where no picture can be.
    tool = {"role": "tool", "content": [image(picture)]}
    error = failure(chat([{"role": "user", "content": "Draw."}, tool]), processor)
    assert "0 image tokens" in str(error)


def test_what_a_template_refuses(processor):
    pictured = {"role": "user", "content": [image(data_url(encoded()))]}
    prepared(chat([pictured]), processor)
    broken = MllamaProcessor(
        processor.image_processor, processor.tokenizer, "{{ raise_exception('No, thanks.') }}"
    )
    error = failure(chat([pictured]), broken)
    assert "No, thanks." in str(error)
    assert error.field == "messages"
    messages = [pictured, {"role": "assistant", "content": "Yes"}, pictured]
    assert failure(chat(messages, continue_final_message=True), processor).field == "messages"


def test_tokens_of_another_vocabulary(processor):
    size = len(processor.tokenizer)
    assert failure(completion([5, size]), processor).field == "prompt"
    for name, value in (
        ("stop_token_ids", [size]),
        ("allowed_token_ids", [5, size + 1]),
        ("logit_bias", {str(size): 1}),
        ("logit_bias", {str(processor.image_token_id): 1}),
    ):
        error = failure(completion("x", **{name: value}), processor)
        assert error.field == name
        assert str(size) in str(error) or "<|image|>" in str(error)


def test_threads_prepare_the_same(processor):
    requests = [
        chat(
            [
                {
                    "role": "user",
                    "content": [text(f"<|eot_id|> {i}"), image(data_url(encoded((i, 5))))],
                }
            ]
        )
        for i in range(1, 33)
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: prepared(request, processor), requests))
    for request, found in zip(requests, together, strict=True):
        alone = prepared(request, processor)
        np.testing.assert_array_equal(found.input_ids, alone.input_ids)
        assert [picture.key for picture in found.pictures] == [p.key for p in alone.pictures]


# --- lines of results -----------------------------------------------------------------------------


def answer(request, ids, choices, prompt_logprobs=None):
    return Answer(
        prepared=PreparedRequest(request, np.asarray(ids, np.int32), (), ()),
        choices=choices,
        prompt_logprobs=prompt_logprobs,
        timings=Timings(0.0, 0.0, 0.0),
    )


def line_of(answer, processor):
    line = response_line(
        answer, model_name="tiny", tokenizer=processor.tokenizer, created=1_700_000_000
    )
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    return line


def test_the_line_of_a_chat(processor):
    request = Request("request-1", "chat", messages=({"role": "user", "content": "Hi"},))
    choices = (
        Choice(0, (7, 8, 9), "Hello", "stop"),
        Choice(1, (7, 8), "Hell", "length", stop_reason=None),
        Choice(2, (7,), "He", "stop", stop_reason="llo"),
    )
    line = line_of(answer(request, [1, 2, 3, 4], choices), processor)
    response = line["response"]
    ids = [line.pop("id"), response.pop("request_id"), response["body"].pop("id")]
    assert [name.rstrip("0123456789abcdef") for name in ids] == ["batch_req_", "req_", "chatcmpl-"]
    message = {"role": "assistant", "refusal": None}
    assert line == {
        "custom_id": "request-1",
        "response": {
            "status_code": 200,
            "body": {
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": message | {"content": "Hello"},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": None,
                    },
                    {
                        "index": 1,
                        "message": message | {"content": "Hell"},
                        "logprobs": None,
                        "finish_reason": "length",
                        "stop_reason": None,
                    },
                    {
                        "index": 2,
                        "message": message | {"content": "He"},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": "llo",
                    },
                ],
                "usage": {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10},
            },
        },
        "error": None,
    }
    again = line_of(answer(request, [1], choices), processor)
    assert [again["id"], again["response"]["request_id"], again["response"]["body"]["id"]] == ids
    other = Request("request-2", "chat", messages=request.messages)
    assert line_of(answer(other, [1], choices), processor)["id"] != ids[0]


def test_logprobs_of_a_chat(processor):
    [whole] = processor.tokenizer.encode(" the")
    snowman = processor.tokenizer.encode("☃")
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = (whole, *snowman, end)
    logprobs = tuple(
        TokenLogprob(token, -0.5, ((token, -0.5), (whole, float("-inf")))) for token in ids
    )
    request = Request("one", "chat", options=SamplingOptions(logprobs=2))
    choice = Choice(0, ids, " the☃", "stop", None, logprobs)
    line = line_of(answer(request, [1], (choice,)), processor)
    found = line["response"]["body"]["choices"][0]["logprobs"]
    assert found["refusal"] is None
    the = {"token": " the", "bytes": list(b" the")}
    assert found["content"][0] == the | {
        "logprob": -0.5,
        "top_logprobs": [the | {"logprob": -0.5}, the | {"logprob": -9999.0}],
    }
    assert len(snowman) > 1
    pieces = found["content"][1:-1]
    assert bytes(byte for piece in pieces for byte in piece["bytes"]) == "☃".encode()
    assert all(piece["token"].startswith("bytes:\\x") for piece in pieces)
    assert found["content"][-1]["token"] == "<|eot_id|>"


def test_the_line_of_a_completion_with_echo(processor):
    tokenizer = processor.tokenizer
    bos, end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")
    prompt = [bos, *tokenizer.encode("Once ☃")]
    new = [*tokenizer.encode(" upon a"), end]
    request = completion("Once ☃", echo=True, logprobs=1)

    def entry(token):
        return TokenLogprob(token, -1.0, ((5, -0.25),))

    choice = Choice(0, tuple(new), " upon a", "stop", None, tuple(map(entry, new)))
    echoed = answer(request, prompt, (choice,), (None, *map(entry, prompt[1:])))
    line = line_of(echoed, processor)
    body = line["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    [found] = body["choices"]
    assert found["text"] == "Once ☃ upon a"
    logprobs = found["logprobs"]
    ids = prompt + new
    texts = [token_text(token_bytes(tokenizer, token)) for token in ids]
    five = token_text(token_bytes(tokenizer, 5))
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [None] + [-1.0] * (len(ids) - 1)
    assert logprobs["top_logprobs"] == [None, *({five: -0.25, t: -1.0} for t in texts[1:])]
    offsets = logprobs["text_offset"]
    assert len(offsets) == len(ids)
    assert offsets[:2] == [0, 0]
    parts = [b"" if token in (bos, end) else token_bytes(tokenizer, token) for token in ids]
    assert b"".join(parts).decode() == found["text"]
    # Characters that are complete before a token; three tokens share the snowman.
    before = [b"".join(parts[:i]).decode(errors="ignore") for i in range(len(ids))]
    assert offsets == [len(text) for text in before]
    assert sum(token.startswith("bytes:") for token in texts) >= 2
    # Without the prompt's logprobs the offsets still count its text.
    line = line_of(answer(request, prompt, (choice,)), processor)
    assert (
        line["response"]["body"]["choices"][0]["logprobs"]["text_offset"] == offsets[len(prompt) :]
    )
    by_ids = completion(prompt, echo=True)
    line = line_of(answer(by_ids, prompt, (Choice(0, (), "", "length"),)), processor)
    assert line["response"]["body"]["choices"] == [
        {
            "index": 0,
            "text": "<|begin_of_text|>Once ☃",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]


def test_bytes_of_tokens_join_to_the_text(processor):
    words = "Ünïcode ☃ 𝄞 \n\ttabs नमस्ते 漢字 \x00\x7f\xa0\xad end"
    small = MllamaProcessor.from_pretrained(DIGITS / "model")
    for tokenizer in (processor.tokenizer, small.tokenizer):
        ids = tokenizer.encode(words)
        joined = b"".join(token_bytes(tokenizer, token) for token in ids)
        assert joined == words.encode()
    assert token_bytes(processor.tokenizer, len(processor.tokenizer) + 5) == b""


def test_the_line_of_an_error():
    error = RequestError("line 3: n: found 0", field="n", custom_id="one")
    details = {
        "message": "line 3: n: found 0",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_request_error",
    }
    line = error_line("one", error)
    assert json.loads(json.dumps(line)) == line
    response = line["response"]
    assert (response.pop("request_id"), line.pop("id")) == (
        error_line("one", error)["response"]["request_id"],
        error_line("one", error)["id"],
    )
    assert line == {
        "custom_id": "one",
        "response": {"status_code": 400, "body": {"error": details}},
        "error": details,
    }
    nameless = [error_line(None, RequestError(f"line {i}: it is empty")) for i in (1, 2)]
    assert nameless[0]["custom_id"] is None
    assert nameless[0]["id"] != nameless[1]["id"]
    broken = error_line("one", RequestError("out of memory", status_code=500))
    assert broken["error"]["type"] == "server_error"
