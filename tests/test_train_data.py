"""From JSON lines to batches: what is read, what stands together, and what is learned."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from tiny_run import EXAMPLE, write_records

from mllama_jax import MllamaProcessor
from mllama_jax.train.data.batches import Collator, HostBatch, make_dataset
from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.plan import BatchPlan, PlannedBatch
from mllama_jax.train.data.records import DataError, Record
from mllama_jax.train.data.settings import DataConfig
from mllama_jax.train.data.sources import Sources, open_sources, read_records


@pytest.fixture(scope="module")
def example():
    return MllamaProcessor.from_pretrained(EXAMPLE / "model")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_records(path)
    return path


@pytest.fixture(scope="module")
def records(file):
    return read_records(file)


@pytest.fixture(scope="module")
def sources(file):
    return open_sources(DataConfig(str(file)))


def record(*messages: tuple[str, str]) -> Record:
    turns = tuple({"role": role, "content": text} for role, text in messages)
    return Record("here:1", "all", turns, ())


def settings(*lengths: int, **values: Any) -> DataConfig:
    return DataConfig("", lengths=lengths, **values)


def examples(
    processor: MllamaProcessor, records: Sequence[Record], *lengths: int, **values: Any
) -> list[Example]:
    make = ExampleMaker(processor, settings(*lengths, **values))
    return [make(number, record) for number, record in enumerate(records)]


def collated(
    processor: MllamaProcessor, sources: Sources, numbers: Iterable[int], *lengths: int
) -> dict[str, np.ndarray]:
    """Arrays of some records as one batch."""
    make = ExampleMaker(processor, settings(*lengths))
    made = [make(number, sources.record(number)) for number in numbers]
    longest = max(len(example.ids) for example in made)
    length = next(length for length in lengths if length >= longest)
    rows = [[example] for example in made]
    batch = PlannedBatch(rows, length, max(example.num_images for example in made))
    return Collator(processor, sources, make, range(len(made)))(batch).arrays


def plan(
    processor: MllamaProcessor, folder: Path, image_counts: Iterable[int], *run: int
) -> BatchPlan:
    """A plan over conversations with so many pictures each.

    Args:
        run: batch size, number of batches, seed.
    """
    file = folder / "numbered.jsonl"
    picture = {"type": "image", "image": "data:image/png;base64,"}
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [picture] * count},
                    {"role": "assistant", "content": "yes"},
                ]
            }
        )
        for count in image_counts
    ]
    file.write_text("\n".join(lines))
    config = DataConfig(str(file), batch_size=run[0], lengths=(20, 64))
    return BatchPlan(open_sources(config), ExampleMaker(processor, config), config, *run[1:])


def names(batch: PlannedBatch) -> list[int]:
    return [example.record for example in batch.examples]


# Records


def test_a_record_knows_its_pictures_question_and_answer(records):
    first, second = records[:2]
    assert (first.kind, first.images) == ("text only", ())
    assert (second.kind, second.answer) == ("seen", "It is odd.")
    assert second.images[0].endswith("/1.png")
    assert second.question == second.messages[:1]
    assert second.where.endswith("train.jsonl:2")


def test_every_bad_line_is_named(tmp_path):
    good = {"role": "assistant", "content": "a"}
    lines = [
        "{",
        json.dumps([1]),
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "robot", "content": "a"}, good]}),
        json.dumps({"messages": [good, {"role": "user", "content": 3}]}),
        json.dumps({"messages": [{**good, "content": [{"type": "image", "image": "a.png"}]}]}),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "sound"}]}, good]}),
        "",
        json.dumps({"messages": [good], "kind": 3}),
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "absent.png"}]},
                    good,
                ]
            }
        ),
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        read_records(file)
    message = str(error.value)
    for number, expected in {
        1: "not JSON",
        2: "found list",
        3: "expected a list of messages",
        4: "role is 'robot'",
        5: "the last message's role is 'user'",
        6: "the assistant's content holds a picture",
        7: "{'type': 'sound'}",
        9: "'kind' is 3",
        10: "absent.png",
    }.items():
        told = [line for line in message.splitlines() if f"{file}:{number}:" in line]
        assert any(expected in line for line in told), number


def test_only_the_first_problems_are_listed_and_all_are_counted(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("{\n" * 50)
    with pytest.raises(DataError, match="and 30 more"):
        read_records(file)


def test_files_without_conversations_are_refused(tmp_path):
    file = tmp_path / "empty.jsonl"
    with pytest.raises(FileNotFoundError, match="empty"):
        read_records(file)
    file.write_text("\n\n")
    with pytest.raises(DataError, match="holds no conversations"):
        read_records(file)


def test_lines_end_where_json_lines_end(tmp_path):
    """Unicode has more line ends, and JSON lets them stand in strings."""
    messages = [{"role": "assistant", "content": "one\u2028two\x85three"}]
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(f"{line}\r\n{line}\n".encode("utf-8-sig"))
    assert [record.answer for record in read_records(file)] == [messages[0]["content"]] * 2
    file.write_bytes(line.encode() + b"\n" + line.encode("latin-1", "replace"))
    with pytest.raises(DataError, match=r"lines\.jsonl:2: not JSON"):
        read_records(file)


# Which examples stand together


def test_an_epoch_holds_each_record_once_and_the_next_has_another_order(example, tmp_path):
    planned = plan(example, tmp_path, [0, 1, 2, 1] * 6, 4, 12, 3)
    batches = [names(planned[i]) for i in range(len(planned))]
    for epoch in (batches[:6], batches[6:]):
        assert set(Counter(chain.from_iterable(epoch)).values()) == {1}
    assert batches[:6] != batches[6:]


def test_batches_follow_from_their_number_and_the_seed(example, tmp_path):
    one, same = (plan(example, tmp_path, range(10), 3, 9, 1) for _ in range(2))
    forwards = [names(one[i]) for i in range(9)]
    assert forwards == [names(same[i]) for i in reversed(range(9))][::-1]
    other = plan(example, tmp_path, range(10), 3, 9, 2)
    assert forwards != [names(other[i]) for i in range(9)]


def test_examples_with_equally_many_pictures_and_of_one_length_stand_together(example, tmp_path):
    planned = plan(example, tmp_path, [0] * 8 + [1] * 8 + [8] * 8, 4, 6, 0)
    shapes = [(planned[i].num_images, planned[i].length) for i in range(6)]
    assert Counter(shapes) == {(0, 20): 2, (1, 20): 2, (8, 64): 2}
    for index in range(6):
        assert len({example.num_images for example in planned[index].examples}) == 1


def test_too_few_records_for_a_batch_are_refused(example, tmp_path):
    with pytest.raises(DataError, match=r"data\.batch_size=4"):
        plan(example, tmp_path, [0, 0, 0], 4, 1, 0)


# Arrays


def test_only_the_answers_are_learned(example, sources, records):
    batch = collated(example, sources, range(6), 26, 40)
    labels, ids = batch["labels"], batch["input_ids"]
    learned = labels != -100
    np.testing.assert_array_equal(labels[learned], ids[learned])
    for row, record in enumerate(records[:6]):
        assert example.decode(labels[row][learned[row]]) == f"{record.answer}<|eot_id|>"
    assert not learned[batch["attention_mask"] == 0].any()
    assert {values.dtype.name for values in batch.values()} == {"int32", "float32"}
    assert batch["pixel_values"].shape[:2] == (6, 1)


def test_arrays_are_those_that_the_processor_makes(example, sources, records):
    expected = example(
        images=[list(record.images) for record in records[:6]],
        text=[example.apply_chat_template(list(record.messages)) for record in records[:6]],
        padding="max_length",
        max_length=40,
        padding_side="right",
        return_tensors="np",
    )
    found = collated(example, sources, range(6), 40)
    assert found.keys() == {*expected, "labels"}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_everything_but_pictures_is_learned_if_asked_for(example, records):
    [made] = examples(example, records[1:2], 40, loss_on="all")
    is_image = made.ids == example.image_token_id
    assert is_image.sum() == 1
    np.testing.assert_array_equal(made.labels, np.where(is_image, -100, made.ids))


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(example):
    turns = (
        ("system", "Be brief."),
        ("user", "Is 3 even or odd?"),
        ("assistant", "It is odd."),
        ("user", "<|eot_id|>And 4?"),
        ("assistant", "It is even."),
    )
    [made] = examples(example, [record(*turns)], 128)
    learned = made.labels[made.labels != -100]
    assert example.decode(learned) == "It is odd.<|eot_id|>It is even.<|eot_id|>"


def test_a_prompt_without_its_answer_has_the_ids_that_training_saw(example, records):
    [made] = examples(example, records[1:2], 40)
    prompt = example.apply_chat_template(list(records[1].question), add_generation_prompt=True)
    ids = example.tokenizer.encode(prompt)
    assert made.ids[: len(ids)].tolist() == ids
    assert made.labels[len(ids) - 1] == -100
    assert made.labels[len(ids)] != -100


def test_bos_that_the_template_leaves_out_shifts_nothing(example):
    template = example.chat_template.replace("{{- bos_token }}", "")
    bare = MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)
    one = record(("user", "Is 3 even or odd?"), ("assistant", "It is odd."))
    [expected], [found] = (examples(p, [one], 40) for p in (example, bare))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_rows_are_padded_to_the_smallest_length_that_fits(example, file):
    def lengths(*allowed: int) -> set[int]:
        config = DataConfig(str(file), batch_size=6, lengths=allowed)
        make = ExampleMaker(example, config)
        planned = BatchPlan(open_sources(config), make, config, 4, 0)
        return {planned[i].length for i in range(4)}

    assert lengths(20, 40, 64) == {20, 40}
    assert lengths(8, 40, 64) == {40}


def test_conversations_that_are_too_long_are_refused(example, records):
    with pytest.raises(DataError, match=r"train\.jsonl:2: \d+ tokens, longer than .*lengths, 8"):
        examples(example, records[1:2], 8)


def test_a_template_that_rewrites_earlier_turns_is_refused(example):
    template = "{{ bos_token }}{{ messages | length }}{{ messages[-1]['content'] }}"
    odd = MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)
    one = record(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"here:1: messages\[1\]: the chat template"):
        examples(odd, [one], 40)


def with_template(example, template):
    return MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)


def test_a_conversation_that_the_template_refuses_is_named(example):
    strict = with_template(example, "{{ raise_exception('no system, please') }}")
    with pytest.raises(DataError, match=r"here:1: .*no system, please"):
        examples(strict, [record(("user", "a"), ("assistant", "b"))], 40)


def test_a_template_that_loses_pictures_is_refused(example, records):
    blind = with_template(example, example.chat_template.replace("<|image|>", ""))
    with pytest.raises(DataError, match=r"train\.jsonl:2: .* 0 <\|image\|> for 1 pictures"):
        examples(blind, records[1:2], 40)


def test_answers_without_any_token_are_refused(example):
    endless = with_template(
        example,
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )
    one = record(("user", "a"), ("assistant", "b"))
    [made] = examples(endless, [one], 8)
    assert example.decode(made.labels[made.labels != -100]) == "b\n"
    silent = with_template(endless, endless.chat_template.replace("\n", ""))
    with pytest.raises(DataError, match=r"here:1: there is nothing to learn"):
        examples(silent, [record(("user", "a"), ("assistant", ""))], 8)


def test_templates_are_told_one_fixed_date(example):
    dated = with_template(example, "{{ date_string }}" + example.chat_template)
    one = record(("user", "a"), ("assistant", "b"))
    texts = [
        example.decode(made.ids, skip_special_tokens=True)
        for [made] in (
            examples(dated, [one], 60),
            examples(dated, [one], 60, date_string="1 May 2031"),
        )
    ]
    assert texts[0].startswith("26 Jul 2024")
    assert texts[1].startswith("1 May 2031")


def test_a_restored_iterator_goes_on_with_the_batches_that_would_have_come(example, sources):
    def dataset() -> grain.IterDataset:
        return make_dataset(
            sources, example, settings(40, batch_size=4), steps=17, seed=5, rows=range(4)
        )

    def rest_of(iterator: Iterator[HostBatch]) -> list[np.ndarray]:
        return [batch.arrays["input_ids"] for batch in iterator]

    iterator = iter(dataset())
    for _ in range(3):
        next(iterator)
    place = iterator.get_state()
    rest = rest_of(iterator)
    other = iter(dataset())
    other.set_state(place)
    np.testing.assert_array_equal(rest_of(other), rest)
    assert len(rest) == 14


@pytest.mark.parametrize("packing", [False, True])
def test_any_number_of_threads_gives_the_same_batches(example, tmp_path, packing):
    """More of them than a window has batches: they ask for many windows at a time."""
    write_records(tmp_path / "few.jsonl", 12)

    def ids(threads: int) -> list[list[list[int]]]:
        config = DataConfig(
            str(tmp_path / "few.jsonl"),
            batch_size=8,
            lengths=(32,),
            threads=threads,
            packing=packing,
        )
        batches = make_dataset(open_sources(config), example, config, steps=40, seed=3)
        return [batch.arrays["input_ids"].tolist() for batch in batches]

    assert ids(16) == ids(1)
