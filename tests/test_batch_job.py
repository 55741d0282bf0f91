"""Jobs from file to file: what is written, what a second run does, and what is refused."""

import dataclasses
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import EXAMPLE, OPTIONS, PICTURES, PROCESSOR, answers, ask, make_engine

from mllama_jax.batch.engine import Engine
from mllama_jax.batch.inputs import (
    Entry,
    PictureFolder,
    RequestsFile,
    Shard,
    Source,
    _custom_id_of,
    items,
    result_key,
)
from mllama_jax.batch.job import Outcome, run_job
from mllama_jax.batch.merge import merge_shards, results_in_order
from mllama_jax.batch.request_json import MAX_LINE_BYTES
from mllama_jax.batch.requests import Request, RequestError, SamplingOptions, parse_line
from mllama_jax.batch.results_file import ResultsFile, job_path
from mllama_jax.cli import main

JOB = {"model": "digits", "dtype": "float32"}


def small_engine() -> Engine:
    """For short prompts with pictures, which need few programs."""
    return make_engine(prompt_lengths=(32,))


def short(count: int) -> list[Request]:
    """Requests of different length."""
    return [
        ask(f"short {i}", "Which digit is this?", i % 14, max_tokens=1 + 5 * i % 13)
        for i in range(count)
    ]


def line(name: Any, *pictures: int, text: str = "Which digit is this?", **body: Any) -> str:
    """A request about some of the pictures, whose folder requests may read."""
    parts = [{"type": "image_url", "image_url": {"url": PICTURES[p].name}} for p in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, **body}
    record = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(record)


def write(file: Path, *lines: str | bytes) -> RequestsFile:
    file.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return RequestsFile(file)


def run(source: Source, output: Path, *, retry_errors: bool = False, **options: Any) -> Outcome:
    with ResultsFile(output, JOB, retry_errors=retry_errors) as results:
        return run_job(
            small_engine(),
            source,
            results,
            tokenizer=PROCESSOR.tokenizer,
            model_name="digits",
            **{"show": False, **options},
        )


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def texts(file: Path) -> dict[str, str]:
    """The answers by custom_id; each is there once."""
    found = {}
    for result in read(file):
        if result["error"] is None:
            assert result["custom_id"] not in found
            [choice] = result["response"]["body"]["choices"]
            found[result["custom_id"]] = choice["message"]["content"]
    return found


def errors(file: Path) -> dict[str | None, str]:
    return {r["custom_id"]: r["error"]["message"] for r in read(file) if r["error"] is not None}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_every_line_has_one_result_and_a_second_run_adds_none(tmp_path: Path, output: Path):
    source = write(
        tmp_path / "requests.jsonl",
        line("one", 2),
        "  ",
        line("two", 1, 3, text="Which is larger?"),
        "{",
        line("one", 5),  # the third of this name is an error as well
        line("one", 5),
        line("missing").replace('"text": "Which', '"image": "x", "text": "Which'),
        line("none", temperature=-1),
        "[1]",
    )
    metrics = tmp_path / "metrics.jsonl"
    outcome = run(source, output, metrics=metrics)
    assert (outcome.total, outcome.done, outcome.errors) == (8, 8, 6)
    assert (outcome.stopped_by, outcome.gave_up) == (None, False)
    assert "2 answered, 6 failed" in outcome.summary

    requests = [ask("one", "Which digit is this?", 2), ask("two", "Which is larger?", 1, 3)]
    requests = [
        dataclasses.replace(r, options=SamplingOptions(max_tokens=6, temperature=0))
        for r in requests
    ]
    expected = answers(small_engine(), requests)
    assert texts(output) == {name: expected[name].choices[0].text for name in ("one", "two")}
    messages = [result["error"]["message"] for result in read(output) if result["error"]]
    named = sorted(result["custom_id"] or "" for result in read(output) if result["error"])
    assert named == ["", "", "", "", "missing", "none"]
    for number, what in ((4, "not valid JSON"), (5, "which line 1 has"), (6, "which line 1 has")):
        assert sum(m.startswith(f"line {number}: ") and what in m for m in messages) == 1
    assert len({result["id"] for result in read(output)}) == 8
    assert json.loads(metrics.read_text().splitlines()[-1])["failed"] == 6

    before = output.read_bytes()
    again = run(source, output)
    assert output.read_bytes() == before
    assert (again.done, again.errors) == (8, 6)
    assert "8 were done before" in again.summary
    assert next(items(source, Shard(), {result_key(r) for r in read(output)}), None) is None


def test_a_torn_last_line_is_done_again(tmp_path: Path, output: Path):
    source = write(tmp_path / "requests.jsonl", *(line(str(i), i) for i in range(4)))
    run(source, output)
    expected, whole = texts(output), output.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for size in (len(whole) - 1, len(whole) - 40, last + 1, last, 3, 0):
        output.write_bytes(whole[:size])
        run(source, output)
        assert texts(output) == expected
        assert output.read_bytes().startswith(whole[: last if size >= last else 0])
    output.write_bytes(b'{"custom_id": "1"}\n' + whole)
    with pytest.raises(ValueError, match=r"line 1 is not a result of a job .*KeyError: 'error'"):
        run(source, output)


def test_errors_are_asked_again_when_told(tmp_path: Path, output: Path):
    requests = tmp_path / "requests.jsonl"
    lines = [line("good", 1), line("bad", 1, top_p=7), "{", line("good", 2)]
    run(write(requests, *lines), output)
    good = [result for result in read(output) if result["error"] is None]
    run(write(requests, lines[0], line("bad", 1), line("new", 2), lines[3]), output)
    assert sorted(texts(output)) == ["good", "new"]
    assert len(errors(output)) == 2
    outcome = run(
        write(requests, lines[0], line("bad", 1), line("new", 2), lines[3]),
        output,
        retry_errors=True,
    )
    assert sorted(texts(output)) == ["bad", "good", "new"]
    assert (outcome.done, outcome.errors) == (4, 1)
    assert read(output)[0] == good[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "requests.jsonl",
        "results.jsonl",
        "results.jsonl.job.json",
    ]


def test_results_are_on_the_disk_within_seconds(output: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    now = 100.0
    monkeypatch.setattr("os.fsync", lambda _: synced.append(output.read_bytes().count(b"\n")))
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ResultsFile(output, JOB) as results:
        synced.clear()
        for number in range(3):
            results.append({"custom_id": str(number), "error": None})
        now += 4.9
        results.update()
        assert synced == []
        now += 0.2
        results.update()  # nothing is appended
        assert synced == [3]
        now += 60.0
        results.update()
        results.append({"custom_id": "4", "error": None})
        assert synced == [3]
        now += 5.1
        results.append({"custom_id": "5", "error": None})
        assert synced == [3, 5]
        results.append({"custom_id": "6", "error": None})
    assert synced == [3, 5, 6]


def test_two_jobs_do_not_write_one_file(tmp_path: Path, output: Path):
    run(write(tmp_path / "requests.jsonl", line("a", 1), line("b", top_p=7)), output)
    for retry_errors in (False, True):  # the latter puts another file there
        with (
            ResultsFile(output, JOB, retry_errors=retry_errors),
            pytest.raises(FileExistsError, match="another process is writing it"),
        ):
            ResultsFile(output, JOB)
    ResultsFile(output, JOB).__exit__(None, None, None)


def test_results_of_different_jobs_do_not_mix(tmp_path: Path, output: Path):
    source = write(tmp_path / "requests.jsonl", line("a", 1))
    run(source, output)
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match='dtype was "float32" and is now "bfloat16"; new'):
        ResultsFile(output, {**JOB, "dtype": "bfloat16", "new": 1})
    job_path(output).rename(tmp_path / "away")
    with pytest.raises(FileExistsError, match=r"results.jsonl.job.json is missing\): give anot"):
        ResultsFile(output, JOB)
    job_path(output).write_text("[]")
    with pytest.raises(ValueError, match="not the description of a job"):
        ResultsFile(output, JOB)
    assert output.read_bytes() == before
    output.unlink()
    job_path(output).unlink()
    with ResultsFile(output, {"model": "other"}) as results:  # nothing is there to mix with
        results.keep(date="1 May 2025")
        results.append({"custom_id": "a\x85\u2028", "error": None})
    with ResultsFile(output, {"model": "other"}) as results:
        assert results.kept == {"date": "1 May 2025"}
        assert len(output.read_text().splitlines()) == results.num_lines == 1


def test_fuzzed_lines_have_one_result_each(tmp_path: Path, output: Path):
    draw = random.Random(0)
    whole = [line(f"fuzz {i} é", i % 14).encode() for i in range(60)]
    fuzzed = []
    for data in whole:
        data = bytearray(data)
        for _ in range(draw.randrange(3)):
            kind, place = draw.randrange(4), draw.randrange(len(data))
            if kind == 0:
                data[place] = draw.choice([c for c in range(256) if c != 10])
            elif kind == 1:
                del data[place : place + draw.randrange(30)]
            elif kind == 2:
                data[place:place] = draw.choice(
                    [b"\xff", b"[" * 200, b"9" * 5000, b"\\ud800", b","]
                )
            else:
                data = data[:place] or data
        fuzzed.append(bytes(data))
    fuzzed += [b"[" * 100_000, b"\x00", b"\xef\xbb\xbf" + whole[0], whole[1] + b"\r", b"null"]
    fuzzed += [b"7" * (MAX_LINE_BYTES + 9)]
    source = write(tmp_path / "requests.jsonl", *fuzzed)
    found = []
    for number, data in enumerate(fuzzed, 1):
        try:
            custom_id = parse_line(data, number=number).custom_id
        except RequestError as error:
            custom_id = error.custom_id
        found.append(custom_id)
    assert [_custom_id_of(data) for data in fuzzed] == found
    assert len([name for name in found if name is None]) > 10
    outcome = run(source, output)
    assert outcome.total == outcome.done == len(fuzzed)
    before = output.read_bytes()
    run(source, output)
    assert output.read_bytes() == before
    names = [result["custom_id"] for result in read(output) if result["custom_id"]]
    assert len(set(names)) == len(names) == len(set(found) - {None})


def test_shards_are_joined_in_the_order_of_the_requests(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = [line(f"number {i}", i) for i in range(9)]
    lines[4:4] = ["{", lines[0]]
    source = write(tmp_path / "requests.jsonl", *lines)
    run(source, output)
    expected = output.with_name("expected.jsonl")
    output.rename(expected)
    job_path(output).unlink()
    shards = [Shard.parse("0/3"), Shard(1, 3), Shard(2, 3)]
    with pytest.raises(FileNotFoundError, match="nothing to merge: no files such as"):
        merge_shards(source, output)
    for shard in shards[:2]:
        run(source, shard.path(output), shard=shard)
    with pytest.raises(FileNotFoundError, match=r"results\.2-of-3\.jsonl missing: run the job"):
        merge_shards(source, output)
    last = shards[2].path(output)
    run(source, last, shard=shards[2])
    whole = last.read_bytes()
    last.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(ValueError, match=r"3 requests .*line 2, 8, 11\): finish --shard 2/3"):
        merge_shards(source, output)
    assert not output.exists()
    last.write_bytes(whole)

    for _ in range(2):
        assert merge_shards(source, output) == 2
        names = [json.loads(text)["custom_id"] if text != "{" else None for text in lines]
        names[5] = None
        assert [result["custom_id"] for result in read(output)] == names
        assert texts(output) == texts(expected)
        assert sorted(errors(output).values()) == sorted(errors(expected).values())
    in_order = list(results_in_order(source, [expected]))
    assert [r["custom_id"] for _, r in in_order] == names
    assert [request is None for request, _ in in_order] == [i == 4 for i in range(11)]

    page = tmp_path / "report.html"
    words = ("batch", "--merge", "-i", source.path, "-o", output, "--report", page)
    monkeypatch.setattr("sys.argv", ["mllama-jax", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1  # some are errors
    assert "number 7" in page.read_text()

    run(source, Shard(0, 2).path(output), shard=Shard(0, 2))
    with pytest.raises(FileExistsError, match="jobs of 2 and 3 parts"):
        merge_shards(source, output)
    output.rename(tmp_path / "away")
    job_path(output).unlink()
    for file in tmp_path.glob("results.*-of-2*"):
        file.unlink()
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="not the merged result of several processes"):
        merge_shards(source, output)
    for text in ("3/3", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match="expected I/N"):
            Shard.parse(text)


@pytest.mark.parametrize("shards", range(1, 5))
@pytest.mark.parametrize("processes", range(1, 5))
def test_each_line_is_of_one_part_of_one_shard(shards: int, processes: int):
    for index in range(shards):
        shard = Shard(index, shards)
        parts = [shard.within(process, processes) for process in range(processes)]
        for number in range(100):
            takes = sum(part.takes(number) for part in parts)
            assert takes == shard.takes(number)
    every = [
        Shard(index, shards).within(process, processes).path(Path("a.jsonl"))
        for index in range(shards)
        for process in range(processes)
    ]
    assert len(set(every)) == len(every)


def test_a_folder_of_pictures(tmp_path: Path, output: Path):
    folder = EXAMPLE / "demo" / "pictures"
    options = SamplingOptions(max_tokens=6, temperature=0)
    source = PictureFolder(folder, "Which digit is this?", options)
    run(source, output)
    requests = [
        ask(p.name, "Which digit is this?", i, options=options) for i, p in enumerate(PICTURES)
    ]
    expected = {k: v.choices[0].text for k, v in answers(small_engine(), requests).items()}
    assert texts(output) == expected

    tree = tmp_path / "tree"
    for name in (
        "b/2.PNG",
        "a.jpg",
        "b/.hidden.png",
        ".c/4.png",
        "b/1.webp",
        "z.txt",
        "ä\udcff.png",
    ):
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PICTURES[0].read_bytes())
    names = [entry.custom_id for entry in PictureFolder(tree, "What?").entries()]
    assert names == ["a.jpg", "b/1.webp", "b/2.PNG", "ä\\xff.png"]
    (tree / "z").mkdir()
    with pytest.raises(ValueError, match="no pictures in it"):
        PictureFolder(tree / "z", "What?")
    with pytest.raises(ValueError, match="no such folder"):
        PictureFolder(tree / "a.jpg", "What?")
    with pytest.raises(ValueError, match="not a regular file"):
        RequestsFile(tree)


class Signalled:
    """Requests of which reading one sends this process a signal."""

    def __init__(self, requests: list[Request], at: int, number: int = signal.SIGTERM):
        self._requests, self._at, self._number = requests, at, number
        self.read = 0

    def entries(self) -> Iterator[Entry]:
        for number, request in enumerate(self._requests, 1):
            yield Entry(number, request.custom_id, request)

    def request(self, entry: Entry) -> Request:
        self.read += 1
        if entry.number == self._at:
            signal.raise_signal(self._number)
        return entry.data

    def count(self, shard: Shard) -> int:
        return len(self._requests)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_begun_is_finished(output: Path, capfd: pytest.CaptureFixture, number: int):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    requests = short(40)
    source = Signalled(requests, 20, number)
    outcome = run(source, output)
    name = signal.Signals(number).name
    assert (outcome.stopped_by, outcome.gave_up) == (name, False)
    # No more was read than what may be ahead of the slots.
    assert source.read == 20
    assert 0 < outcome.done < 20
    assert f"{outcome.done} of 40 requests have a result" in outcome.summary
    assert f"{name}: finishing what has begun" in capfd.readouterr().err
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    ]
    rest = run(Signalled(requests, 0), output)
    assert (rest.done, rest.errors, rest.stopped_by) == (40, 0, None)
    found = texts(output)
    assert len(found) == 40
    expected = answers(small_engine(), requests)
    assert found == {name: answer.choices[0].text for name, answer in expected.items()}


def test_what_is_not_finished_in_time_is_left_for_the_next_run(output: Path):
    requests = [
        ask(str(i), "Which digit is this?", i % 14, max_tokens=70, ignore_eos=True)
        for i in range(9)
    ]
    # It comes while the first slots are given away: none of them can be done so soon.
    outcome = run(Signalled(requests, 5), output, grace=0.0)
    assert (outcome.stopped_by, outcome.gave_up, outcome.done) == ("SIGTERM", True, 0)
    assert run(Signalled(requests, 0), output).done == 9
    assert len(texts(output)) == 9


def test_requests_are_read_no_further_than_needed(tmp_path: Path, output: Path):
    """However many there are: only so many are in memory."""
    source = Signalled(short(60), 0)
    ahead = []
    with ResultsFile(output, JOB) as results:
        append = results.append

        def counted(result: Any) -> None:
            append(result)
            ahead.append(source.read - results.num_lines)

        results.append = counted  # type: ignore[method-assign]
        run_job(
            small_engine(),
            source,
            results,
            tokenizer=PROCESSOR.tokenizer,
            model_name="digits",
            show=False,
        )
    assert len(ahead) == 60
    # In slots, waiting for one, and what was just finished.
    assert max(ahead) <= (2 + 2) * OPTIONS.num_slots


def test_a_full_disk_ends_the_job_and_loses_nothing(tmp_path: Path, output: Path):
    import resource

    source = write(tmp_path / "requests.jsonl", *(line(str(i), i) for i in range(6)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(source, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.path.getsize(output) == 1500
    assert run(source, output).done == 6
    assert sorted(texts(output)) == [str(i) for i in range(6)]


def test_what_the_command_refuses(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    requests = write(tmp_path / "requests.jsonl", line("a", 1)).path
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)

    def refusal(*words: Any) -> str:
        monkeypatch.setattr("sys.argv", ["mllama-jax", "batch", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        assert ended.pop() == 2
        return capfd.readouterr().err

    asked = ("-i", requests, "-o", output)
    model = ("--model", EXAMPLE / "model")
    assert "give --model" in refusal(*asked)
    assert "one of them" in refusal(*model, "-o", output)
    assert "--image-folder needs --prompt" in refusal(*model, "--image-folder", EXAMPLE, *asked[2:])
    assert "--prompt belongs to" in refusal(*model, *asked, "--prompt", "What?")
    assert "no such file" in refusal(*model, "-i", tmp_path / "no", "-o", output)
    assert "nowhere" in refusal("--model", tmp_path / "nowhere", *asked)
    assert "--allow-folder no: no such folder" in refusal(*model, *asked, "--allow-folder", "no")
    assert "--max-tokens 0: expected" in refusal(*model, *asked, "--max-tokens", 0)
    assert "shard '4/4'" in refusal(*model, *asked, "--shard", "4/4")
    page = ("--report", tmp_path / "page.html")
    assert "give --report with --merge" in refusal(
        *model, *asked, *page, "--distributed", "--shard", "0/4"
    )
    assert not output.exists()


def test_a_job_counts_only_its_own_requests(tmp_path):
    engine = small_engine()
    assert len(list(engine.run(short(3)))) == 3
    source, metrics = write(tmp_path / "in", line("a"), line("b", max_tokens=2)), tmp_path / "m"
    with ResultsFile(tmp_path / "out", JOB) as results:
        outcome = run_job(
            *(engine, source, results),
            tokenizer=PROCESSOR.tokenizer,
            model_name="digits",
            metrics=metrics,
            show=False,
        )
    usage = [result["response"]["body"]["usage"] for result in read(tmp_path / "out")]
    tokens = [sum(x[f"{kind}_tokens"] for x in usage) for kind in ("prompt", "completion")]
    last = read(metrics)[-1]
    assert (last["done"], last["tokens_in"], last["tokens_out"]) == (2, *tokens)
    assert f"Tokens    {tokens[0]} in (" in outcome.summary
