"""Packed training data: which examples share rows, their arrays, and a run that goes on."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import random_params
from tiny_run import tiny_config, write_processor, write_records

import mllama_jax as mj
from mllama_jax import MllamaProcessor
from mllama_jax.train.data.batches import Collator, HostBatch, make_dataset
from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.packing import pack
from mllama_jax.train.data.plan import WINDOW_BATCHES, BatchPlan, PlannedBatch
from mllama_jax.train.data.records import BadRecord
from mllama_jax.train.data.settings import DataConfig, data_problems
from mllama_jax.train.data.sources import open_sources

LENGTH, MOST_IMAGES = 90, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    write_processor(path / "start")
    write_records(path / "train.jsonl", count=50)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return MllamaProcessor.from_pretrained(folder / "start")


def settings(folder: Path, **values: Any) -> DataConfig:
    settings = {"batch_size": 2, "packing": True, "max_images": MOST_IMAGES}
    settings |= {"train": str(folder / "train.jsonl"), "lengths": (40, LENGTH)}
    return DataConfig(**{**settings, **values})


def plan(processor: Any, config: DataConfig, seed: int = 0, steps: int = 99) -> BatchPlan:
    return BatchPlan(open_sources(config), ExampleMaker(processor, config), config, steps, seed)


def batches_of(processor: Any, config: DataConfig, **options: Any) -> list[HostBatch]:
    return list(make_dataset(open_sources(config), processor, config, seed=4, **options))


def made_up(count: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(i, f"{i}", np.zeros(rng.integers(1, 60)), np.zeros(0), rng.integers(0, 4))
        for i in range(count)
    ]


def records(rows: Any) -> list[list[int]]:
    return [[example.record for example in row] for row in rows]


def used(rows: Any) -> np.ndarray:
    """Tokens and pictures of each row."""
    return np.array(
        [(sum(len(e.ids) for e in row), sum(e.num_images for e in row)) for row in rows]
    )


@pytest.mark.parametrize(("multiple", "most_images"), [(1, 5), (4, 5), (1, 20), (7, 20)])
def test_rows_hold_every_example_once_and_are_evenly_filled(multiple: int, most_images: int):
    rows = pack(made_up(200, most_images), 128, most_images, multiple)
    assert sorted(chain.from_iterable(records(rows))) == list(range(200))
    tokens, images = used(rows).T
    assert tokens.max() <= 128
    assert images.max() <= most_images
    fewest = max(tokens.sum() / 128, images.sum() / most_images)
    assert len(rows) % multiple == 0
    assert len(rows) <= 1.1 * fewest + multiple
    assert images.max() <= images.mean() + 3  # an example's most
    assert tokens.min() > 0.5 * tokens.mean()


def test_examples_as_large_as_rows_and_fewer_than_rows():
    large = [Example(i, "", np.zeros(10), np.zeros(0), 2) for i in range(3)]
    assert sorted(records(pack(large, 10, 9))) == [[0], [1], [2]]
    assert sorted(records(pack(large, 99, 2))) == [[0], [1], [2]]
    assert sorted(records(pack(large, 99, 9, multiple=5))) == [[], [], [0], [1], [2]]


def test_an_epoch_of_packed_batches_holds_each_record_once(folder, processor):
    planned = plan(processor, settings(folder))
    windows = [
        [planned[place] for place in range(first, first + planned._window_places)]
        for first in (0, planned._window_places)
    ]
    for window in windows:
        batches = [batch for batch in window if batch is not None]
        counts = Counter(example.record for batch in batches for example in batch.examples)
        assert counts == dict.fromkeys(range(50), 1)
        assert len(batches) < 15  # unpacked there are 25
        for batch in batches:
            assert (len(batch.rows), batch.length) == (2, LENGTH)
            assert max(sum(len(e.ids) for e in row) for row in batch.rows) <= LENGTH
            assert batch.num_images == max(sum(e.num_images for e in r) for r in batch.rows)
            assert batch.num_images <= MOST_IMAGES
    shapes = {
        batch.num_images
        for planned in [plan(processor, settings(folder, max_images=18))]
        for batch in map(planned.__getitem__, range(60))
        if batch
    }
    assert shapes <= {0, 3, 6, 9, 12, 15, 18}
    assert [records(b.rows) for b in windows[0] if b] != [records(b.rows) for b in windows[1] if b]


def test_windows_are_of_about_so_many_batches(folder, processor):
    write_records(folder / "many.jsonl", count=400)
    config = settings(folder, batch_size=1, max_images=8, train=str(folder / "many.jsonl"))
    planned = plan(processor, config)
    for first in (0, planned._window_places):
        window = [planned[first + place] is not None for place in range(planned._window_places)]
        assert WINDOW_BATCHES - 2 <= sum(window) <= WINDOW_BATCHES + 1
        gaps = np.diff(np.flatnonzero(window))
        assert max(gaps) <= planned.places_a_batch


def test_packed_batches_follow_from_their_place_and_the_seed(folder, processor):
    def found(seed: int, places: range) -> dict[int, Any]:
        planned = plan(processor, settings(folder), seed)
        batches = {place: planned[place] for place in places}
        return {place: records(batch.rows) for place, batch in batches.items() if batch}

    forwards = found(1, range(60))
    assert forwards == found(1, range(59, -1, -1))
    assert forwards != found(2, range(60))


def test_a_run_has_its_number_of_batches_and_goes_on_with_those_that_would_have_come(
    folder, processor
):
    config = settings(folder)
    whole = batches_of(processor, config, steps=30)
    assert len(whole) == 30
    for done in (0, 1, 13, 29, 30):
        options: Any = {"steps": 30, "seed": 4}
        first = iter(make_dataset(open_sources(config), processor, config, **options))
        for _ in range(done):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        rest = iter(make_dataset(open_sources(config), processor, config, **options))
        rest.set_state(state)
        assert_same_arrays(list(rest), whole[done:])


def test_processes_hold_their_rows_of_the_same_batches(folder, processor):
    config = settings(folder)
    whole = batches_of(processor, config, steps=12)
    parts = [batches_of(processor, config, steps=12, rows=[row]) for row in (0, 1)]
    for batch, *rows in zip(whole, *parts, strict=True):
        for name, values in batch.arrays.items():
            joined = np.concatenate([row.arrays[name] for row in rows])
            np.testing.assert_array_equal(joined, values, err_msg=name)
        for row in rows:
            assert row.num_examples == batch.num_examples
            assert row.filled == batch.filled
        segments = batch.arrays["segment_ids"]
        assert batch.num_examples == segments.max(1).sum()
        assert batch.num_tokens == (segments != 0).sum()
        assert batch.filled == batch.num_tokens / segments.size
        assert batch.num_images == (batch.arrays["aspect_ratio_ids"] != 0).sum()


def assert_same_arrays(found: list[HostBatch], expected: list[HostBatch]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.arrays.keys() == theirs.arrays.keys()
        for name, values in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], values, err_msg=name)


def collated(processor: Any, config: DataConfig, *rows: list[int]) -> HostBatch:
    """The arrays of rows of these records."""
    sources, make = open_sources(config), ExampleMaker(processor, config)
    made = [[make(n, sources.record(n, pictures=False)) for n in row] for row in rows]
    num_images = max(sum(example.num_images for example in row) for row in made)
    length = LENGTH if config.packing else max(len(e.ids) for row in made for e in row)
    batch = PlannedBatch(made, length, num_images, config.packing)
    return Collator(processor, sources, make, range(len(made)))(batch)


def test_every_text_of_a_row_has_the_arrays_that_it_has_alone(folder, processor):
    numbers = [1, 4, 6]  # the second without a picture
    config = settings(folder)
    row = collated(processor, config, numbers, []).arrays
    start = image = 0
    for segment, number in enumerate(numbers, start=1):
        alone = collated(processor, settings(folder, packing=False), [number]).arrays
        length = alone["input_ids"].shape[1]
        images = alone["pixel_values"].shape[1] if "pixel_values" in alone else 0
        tokens, pictures = slice(start, start + length), slice(image, image + images)
        for name in ("input_ids", "labels"):
            np.testing.assert_array_equal(row[name][0, tokens], alone[name][0])
        assert set(row["segment_ids"][0, tokens]) == {segment}
        seen = row["cross_attention_mask"][0, tokens]
        if images:
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                np.testing.assert_array_equal(row[name][0, pictures], alone[name][0])
            np.testing.assert_array_equal(seen[:, pictures], alone["cross_attention_mask"][0])
        assert seen.sum() == (alone["cross_attention_mask"].sum() if images else 0)
        start, image = start + length, image + images
    assert not row["segment_ids"][0, start:].any()
    assert not row["segment_ids"][1].any()
    assert (row["labels"][1] == -100).all()
    assert "attention_mask" not in row


def test_of_a_bad_picture_only_its_own_text_is_left_out(folder, processor, tmp_path):
    for file in folder.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    config = settings(folder)
    good = collated(processor, config, [1, 6]).arrays
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").write_text("not a picture")
    found = collated(processor, settings(tmp_path), [1, 2, 6])
    assert [problem.where[-2:] for problem in found.problems] == [":3"]
    segments = found.arrays["segment_ids"][0]
    assert (segments == 2).sum() == 1
    assert (found.arrays["labels"][0][segments == 2] == -100).all()
    for segment, before in ((1, 1), (3, 2)):
        for name in ("input_ids", "labels"):
            np.testing.assert_array_equal(
                found.arrays[name][0][segments == segment],
                good[name][0][good["segment_ids"][0] == before],
            )
    np.testing.assert_array_equal(found.arrays["pixel_values"][0, :2], good["pixel_values"][0])


def test_an_epoch_has_the_same_loss_packed_and_not(folder, processor):
    model = mj.MllamaForConditionalGeneration(tiny_config(), attention="reference")
    params = random_params(model)

    @jax.jit
    def loss(arrays: Any) -> Any:
        return model.apply({"params": params}, **arrays, method="loss")

    numbers = [n for n in range(20) if n % 5]
    packed, alone = settings(folder, max_images=8), settings(folder, packing=False)
    sources, make = open_sources(packed), ExampleMaker(processor, packed)
    examples = [make(n, sources.record(n, pictures=False)) for n in numbers]
    rows = records(pack(examples, LENGTH, 8))
    assert len(rows) <= len(numbers) / 2
    found = loss(collated(processor, packed, *rows).arrays)
    expected = loss(collated(processor, alone, *[[n] for n in numbers]).arrays)
    assert found[1] == expected[1]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


def test_a_text_with_more_pictures_than_a_row_may_have_is_named(folder, processor):
    config = settings(folder, max_images=1)
    make = ExampleMaker(processor, config)
    record = open_sources(config).record(1, pictures=False)
    assert make(1, record).num_images == 1
    twice = [{"role": "user", "content": [{"type": "image"}] * 2}, record.messages[-1]]
    two = type(record)("here:1", "all", tuple(twice), record.images * 2)
    with pytest.raises(BadRecord, match=r"here:1: 2 pictures.*data\.max_images=1"):
        make(1, two)
    [problem] = data_problems(DataConfig("a", max_images=0))
    assert "data.max_images=0" in problem
