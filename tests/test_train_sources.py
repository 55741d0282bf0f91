"""Conversations of every form, from every kind of file, mixed, and some of them broken."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import ASKED, NAMES, PICTURES, write_everywhere
from gcs_server import Gcs
from tiny_run import EXAMPLE, write_records, write_start

from mllama_jax import MllamaProcessor
from mllama_jax.train.config import ConfigError, ModelConfig, TrainConfig
from mllama_jax.train.config_file import load_config
from mllama_jax.train.data.batches import HostBatch, make_dataset
from mllama_jax.train.data.examples import ExampleMaker
from mllama_jax.train.data.order import make_order
from mllama_jax.train.data.plan import BatchPlan
from mllama_jax.train.data.records import BadRecord, DataError
from mllama_jax.train.data.settings import DataConfig, SourceConfig
from mllama_jax.train.data.skipped import SkippedRecords
from mllama_jax.train.data.sources import open_sources, read_records
from mllama_jax.train.loop import train


@pytest.fixture(scope="module")
def example():
    return MllamaProcessor.from_pretrained(EXAMPLE / "model")


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    return write_everywhere(tmp_path_factory.mktemp("everywhere"))


def batches(
    processor: MllamaProcessor, config: DataConfig, steps: int, rows: Sequence[int] | None = None
) -> list[HostBatch]:
    sources = open_sources(config)
    return list(make_dataset(sources, processor, config, steps=steps, seed=1, rows=rows))


def settings(path: str | Path, folder: Path, **changes: Any) -> DataConfig:
    base = DataConfig(str(path), batch_size=4, lengths=(40,), cache=str(folder / "cache"))
    return replace(base, **changes)


def assert_equal_batches(found: Sequence[HostBatch], expected: Sequence[HostBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        for name, values in one.arrays.items():
            np.testing.assert_array_equal(values, other.arrays[name], err_msg=name)


# Forms and files


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("urls.jsonl", "messages"),
        ("beside.jsonl", "messages"),
        ("llava.jsonl", "llava"),
        ("llava.json", "llava"),
        ("vqa.jsonl", "vqa"),
        ("part-*.parquet", "vqa"),
        ("saved", "vqa"),
        ("llava.arrow", "llava"),
        ("data.array_record", "llava"),
    ],
)
def test_the_same_conversations_make_the_same_batches(example, everywhere, tmp_path, name, form):
    expected = batches(example, settings(everywhere["paths.jsonl"], tmp_path), 2)
    config = settings(everywhere[name], tmp_path)
    assert_equal_batches(batches(example, config, 2), expected)
    assert sum((batch.arrays["aspect_ratio_ids"] > 0).sum() for batch in expected) == 7
    [line] = open_sources(config).describe()
    assert line == f"{everywhere[name]}: 8 conversations, format {form}, 100.0% of the examples"


def test_records_of_every_file_are_read_whole_too(everywhere, tmp_path):
    for path in everywhere.values():
        records = read_records(path, cache=str(tmp_path))
        assert [record.answer for record in records] == [answer for _, answer, _ in ASKED]
        assert [len(record.images) for record in records] == [len(names) for *_, names in ASKED]


def test_parquet_is_unpacked_once_until_it_changes(everywhere, tmp_path):
    file = tmp_path / "data.parquet"
    shutil.copy(everywhere["part-*.parquet"].replace("*", "0"), file)
    cache = tmp_path / "cache"
    read_records(file, cache=str(cache))
    [made] = cache.iterdir()
    before = made.stat().st_mtime_ns
    read_records(file, cache=str(cache))
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]
    shutil.copy(everywhere["part-*.parquet"].replace("*", "1"), file)
    assert len(read_records(file, cache=str(cache))) == 5
    assert len(list(cache.iterdir())) == 2


def test_records_and_pictures_in_a_bucket(example, everywhere, tmp_path, monkeypatch):
    bucket = tmp_path / "root" / "data"
    shutil.copytree(Path(everywhere["saved"]).parent, bucket)
    for name, value in {
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    expected = batches(example, settings(everywhere["paths.jsonl"], tmp_path), 2)
    with Gcs(tmp_path / "root") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        for name in ("llava.jsonl", "saved", "part-*.parquet"):
            config = settings(f"gs://data/{name}", tmp_path)
            assert_equal_batches(batches(example, config, 2), expected)
        assert server.count("media", "data/llava.jsonl") == 1
        batches(example, settings("gs://data/llava.jsonl", tmp_path), 2)
        assert server.count("media", "data/llava.jsonl") == 1  # a copy is here


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"conversations": [{"from": "robot", "value": "a"}]}, "from is 'robot', expected one of"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "image": "a"}, "0 <image> for 1 pict"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "role is 'user', expected 'assist"),
        ({"conversations": [{"from": "gpt", "value": "<image>"}]}, "the assistant's text holds"),
        ({"question": "a", "answers": []}, "'answer' (or 'answers') is []"),
        ({"question": 3, "answer": "a"}, "'question' is 3, expected a string"),
        ({"question": "a", "answer": "b", "image": "x", "images": []}, "expected one of them"),
        ({"question": "a", "answer": "b", "image": "https://x/y.png"}, "have to be downloaded"),
        ({"question": "a", "answer": "b", "image": 3}, "a picture is 3, expected a path"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "images": ["x"]},
            "1 pictures beside the messages, of which 1",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "a picture is None",
        ),
        ({"text": "a"}, "found {file}:1: an object with text. Name the form"),
        ({"messages": [], "question": "a"}, "an object with messages, question. Name the form"),
        ({"messages": None, "question": 3, "answer": "a"}, "'question' is 3, expected a string"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(tmp_path, values, expected):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(values))
    with pytest.raises(DataError) as error:
        read_records(file)
    assert expected.format(file=file) in str(error.value)


def test_pictures_that_tables_name_are_looked_for(tmp_path):
    """As paths, or as Hugging Face's structs of them; bytes are there."""
    shutil.copy(PICTURES / NAMES[0], tmp_path / "there.png")
    named = ["there.png", "lost.png", "https://x/y.png", None]
    structs = [{"bytes": None, "path": name} for name in named[:3]] + [{"bytes": b"", "path": "x"}]
    for name, column in {"paths": named, "structs": structs}.items():
        file = tmp_path / f"{name}.parquet"
        table = {"image": column, "question": ["a"] * 4, "answer": ["b"] * 4}
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        sources = open_sources(settings(file, tmp_path, max_bad_records=2))
        assert [str(problem) for problem in sources.problems] == [
            f"{file}: row 1: there is no picture '{tmp_path}/lost.png'",
            f"{file}: row 2: the picture 'https://x/y.png' would have to be downloaded in every "
            "epoch, which training does not do; download it once and give its path, or copy it "
            "into a bucket (gs://)",
        ]
        table["image"] = [column[1], column[0], *column[2:]]
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        moved = open_sources(settings(file, tmp_path, max_bad_records=2))
        assert moved.fingerprint != sources.fingerprint


def test_files_that_hold_no_records_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\n")
    (tmp_path / "list.json").write_text("[\n{}\n")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "bad.parquet").write_text("PAR")
    (tmp_path / "bad.arrow").write_text("ARROW")
    for name, expected in {
        "data.csv": "expected .jsonl, .json, .parquet",
        "list.json": "begins as a JSON list, but is not JSON",
        "dict": f"holds the splits train, test; give the folder of one, such as {tmp_path}/dict/tr",
        ".": "a folder without state.json",
        "bad.parquet": "not a Parquet file",
        "bad.arrow": "not an Arrow file",
    }.items():
        with pytest.raises(DataError) as error:
            read_records(tmp_path / name, cache=str(tmp_path / "cache"))
        assert expected in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"part-\*"):
        read_records(tmp_path / "part-*.parquet")


# Mixtures


def test_sources_take_turns_as_their_weights_say():
    order = make_order([30, 10, 4], [3.0, 0.5, 0.5], seed=7)
    drawn = [order[i] for i in range(400)]
    sources = ["a" if n < 30 else "b" if n < 40 else "c" for n in drawn]
    assert Counter(sources) == {"a": 300, "b": 50, "c": 50}
    assert Counter(sources[:40])["a"] == 30
    of_a = [n for n in drawn if n < 30]
    assert all(set(of_a[i : i + 30]) == set(range(30)) for i in range(0, 300, 30))
    assert of_a[:30] != of_a[30:60]
    other = make_order([30, 10, 4], [3.0, 0.5, 0.5], seed=8)
    assert [other[i] for i in range(400)] != drawn


def test_without_weights_every_record_comes_once_in_an_epoch():
    order = make_order([5, 3], [None, None], seed=7)
    for epoch in range(3):
        assert sorted(order[8 * epoch + i] for i in range(8)) == list(range(8))


def test_sources_of_different_forms_are_mixed(example, everywhere, tmp_path):
    parts = [SourceConfig(everywhere["saved"], "vqa", 3.0), SourceConfig("text.jsonl", weight=1.0)]
    text = tmp_path / "text.jsonl"
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
    text.write_text("\n".join([json.dumps({"conversations": turns})] * 2))
    parts[1] = replace(parts[1], path=str(text))
    config = settings("", tmp_path, train=None, sources=parts)
    made = batches(example, config, 8)
    answers = [example.decode(row[row != -100]) for batch in made for row in batch.arrays["labels"]]
    assert answers.count("Good day.<|eot_id|>") == 8
    assert len(answers) == 32
    assert "2 conversations, format llava, 25.0% of" in open_sources(config).describe()[1]


# Rows of processes


def test_processes_prepare_their_own_rows_of_one_batch(example, tmp_path):
    write_records(tmp_path / "train.jsonl")
    config = settings(tmp_path / "train.jsonl", tmp_path)
    whole = batches(example, config, 6)
    halves = [batches(example, config, 6, rows) for rows in (range(2), range(2, 4))]
    for number, batch in enumerate(whole):
        for name, values in batch.arrays.items():
            parts = [half[number].arrays[name] for half in halves]
            np.testing.assert_array_equal(np.concatenate(parts), values, err_msg=name)


def test_pictures_of_other_rows_are_not_opened(example, tmp_path):
    """Rows without any picture among rows with some, too: their arrays have slots for them."""
    file = tmp_path / "train.jsonl"
    write_records(file, 4)  # one is text alone
    config = settings(file, tmp_path, max_bad_records=3)
    sources, make = open_sources(config), ExampleMaker(example, config)
    planned = BatchPlan(sources, make, config, 1, 1)[0]
    [row] = [row for row, one in enumerate(planned.examples) if not one.num_images]
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    [batch] = batches(example, config, 1, [row])
    assert not batch.problems
    assert batch.arrays["pixel_values"].shape[:2] == (1, 1)
    assert not batch.arrays["pixel_values"].any()
    np.testing.assert_array_equal(batch.arrays["aspect_ratio_mask"], [[[1, 0, 0, 0]]])
    assert not batch.arrays["cross_attention_mask"].any()


# Bad records


def spoil(folder: Path) -> None:
    """Of 24 records, makes one no conversation, one too long, and breaks a picture."""
    write_records(folder / "train.jsonl", text_only=False)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[3] = "{"
    lines[7] = lines[7].replace("Even or odd?", "Even or odd? " * 20)
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "11.png").write_bytes((folder / "11.png").read_bytes()[:60])


def test_nothing_is_learned_from_bad_records_and_all_else_stays(example, tmp_path):
    spoil(tmp_path)
    config = settings(tmp_path / "train.jsonl", tmp_path, max_bad_records=3)
    made = batches(example, config, 5)
    problems = {p.where.rpartition(":")[2]: p.why for batch in made for p in batch.problems}
    assert problems.keys() == {"8", "12"}
    assert "tokens, longer than the longest of data.lengths, 40" in problems["8"]
    assert "truncated" in problems["12"]
    learned = [(batch.arrays["labels"] != -100).any(axis=1).sum() for batch in made]
    assert sum(learned) == 20 - 2
    assert {batch.arrays["labels"].shape for batch in made} == {(4, 40)}
    for batch in made:
        empty = (batch.arrays["labels"] == -100).all(axis=1)
        assert not batch.arrays["pixel_values"][empty].any()
        assert (batch.arrays["attention_mask"][empty].sum(axis=1) == 1).all()


def test_more_bad_records_than_the_limit_end_a_run(example, tmp_path):
    spoil(tmp_path)
    config = settings(tmp_path / "train.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"The data can't be used:\n  .*train\.jsonl:4: not JSON"):
        open_sources(config)
    config = replace(config, max_bad_records=2)
    sources = open_sources(config)
    skipped = SkippedRecords(tmp_path, 2, sources.problems, 0)
    found = [batch.problems for batch in batches(example, config, 5)]
    first, second = [step for step, problems in enumerate(found) if problems][:2]
    [told] = skipped.add(first, found[first])
    assert skipped.add(first, found[first]) == []
    with pytest.raises(DataError) as error:
        skipped.add(second, found[second])
    assert str(error.value) == (
        f"step {second}: the data can't be used: 3 bad records, data.max_bad_records=2;\n"
        f"  {found[second][0]}"
    )
    named = lines_of(tmp_path / "bad_records.jsonl")
    assert [(line["step"], line["where"]) for line in named] == [
        (0, f"{tmp_path}/train.jsonl:4"),
        (first, told.where),
    ]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_that_is_gone_on_with_counts_as_if_it_had_not_stopped(tmp_path):
    early, late, again = (BadRecord(where, "broken") for where in "abc")
    skipped = SkippedRecords(tmp_path, 4, [early], 0)
    skipped.add(3, [late])
    skipped.add(5, [again])
    resumed = SkippedRecords(tmp_path, 4, [early], 4)  # its checkpoint is of step 4
    assert len(resumed) == 2
    assert resumed.add(5, [late, again]) == [again]
    file = tmp_path / "bad_records.jsonl"
    assert [(line["step"], line["where"]) for line in lines_of(file)] == [
        (0, "a"),
        (3, "b"),
        (5, "c"),
    ]
    assert len(SkippedRecords(tmp_path, 4, [], 0)) == 0
    assert not lines_of(file)


def test_a_run_names_and_counts_bad_records(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_start(tmp_path / "start")
    spoil(tmp_path)
    config = TrainConfig(
        output="~/run",
        steps=5,
        log_every=1,
        model=ModelConfig(str(tmp_path / "start")),
        data=settings(tmp_path / "train.jsonl", tmp_path, max_bad_records=3),
    )
    train(config)
    printed = capfd.readouterr().out
    assert f"Nothing is learned from:\n  {tmp_path}/train.jsonl:4: " in printed
    assert f"nothing is learned from {tmp_path}/train.jsonl:8: " in printed
    named = lines_of(tmp_path / "run" / "bad_records.jsonl")
    assert {line["where"].rpartition(":")[2] for line in named} == {"4", "8", "12"}
    numbers = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert len(numbers) == 5
    for line in numbers:
        assert line["bad_records"] == sum(bad["step"] <= line["step"] for bad in named)
        learned = 20 - 5 * sum(bad["step"] == line["step"] for bad in named)
        assert line["labels"] == learned  # an answer is four words and the token that ends it
        assert np.isfinite(line["loss"])


# Configuration


def test_sources_in_a_configuration(tmp_path):
    file = tmp_path / "train.yaml"
    start = "steps: 3\nmodel: {path: a}\noutput: c\n"
    file.write_text(start + "data:\n  sources:\n  - {path: a.jsonl}\n  - {path: b, format: vqa}\n")
    config = load_config(file)
    assert config.data.all_sources == (SourceConfig("a.jsonl"), SourceConfig("b", "vqa"))
    for data, expected in {
        "{sources: [{path: a, wieght: 3}]}": "'data.sources[0].wieght'; did you mean 'data.sourc",
        "{sources: [{path: a, weight: 3}, {path: b}]}": "data.sources[1].weight=None: others have",
        "{sources: [{path: a, weight: -1}]}": "data.sources[0].weight=-1.0: expected a finite",
        "{sources: [{path: a, format: x}]}": "data.sources[0].format='x': expected auto or mess",
        "{sources: [a]}": "expected a list of {path: …",
        "{train: a, sources: [{path: a}]}": "data.train='a' and 1 data.sources: expected a path",
        "{sources: [{weight: 1}]}": "required but not given: data.sources[0].path",
        "{train: a, loss_on: user}": "data.loss_on='user': expected assistant or all",
    }.items():
        file.write_text(f"{start}data: {data}\n")
        with pytest.raises(ConfigError) as error:
            load_config(file)
        assert expected in str(error.value)
