"""From JSON lines to batches: what is read, what stands together, and what is learned."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from tiny_run import EXAMPLE, write_records

from mllama_jax import MllamaProcessor
from mllama_jax.train.config import DataConfig
from mllama_jax.train.data import BatchPlan, Collator, make_dataset
from mllama_jax.train.evaluation import Answer, chosen, scores, table
from mllama_jax.train.records import DataError, Record, read_records


@pytest.fixture(scope="module")
def example():
    return MllamaProcessor.from_pretrained(EXAMPLE / "model")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_records(file)
    return read_records(file)


def record(*messages: tuple[str, str]) -> Record:
    turns = tuple({"role": role, "content": text} for role, text in messages)
    return Record("here:1", "all", turns, ())


def numbered(*image_counts: int) -> list[Record]:
    return [Record(f"here:{i}", "all", (), ("x",) * n) for i, n in enumerate(image_counts)]


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


# Which records stand together


def test_an_epoch_holds_each_record_once_and_the_next_has_another_order():
    plan = BatchPlan(numbered(*[0, 1, 2, 1] * 6), batch_size=4, num_batches=12, seed=3)
    batches = [[record.where for record in plan[i]] for i in range(len(plan))]
    for epoch in (batches[:6], batches[6:]):
        assert set(Counter(chain.from_iterable(epoch)).values()) == {1}
    assert batches[:6] != batches[6:]


def test_batches_follow_from_their_number_and_the_seed():
    records = numbered(*range(10))
    plan, same = (BatchPlan(records, 3, 9, seed=1) for _ in range(2))
    forwards = [plan[i] for i in range(9)]
    assert forwards == [same[i] for i in reversed(range(9))][::-1]
    other = BatchPlan(records, 3, 9, seed=2)
    assert forwards != [other[i] for i in range(9)]


def test_records_with_equally_many_pictures_stand_together():
    plan = BatchPlan(numbered(*[0] * 8 + [1] * 8 + [2] * 8), batch_size=4, num_batches=6, seed=0)
    for index in range(6):
        assert len({len(record.images) for record in plan[index]}) == 1


def test_too_few_records_for_a_batch_are_refused():
    with pytest.raises(DataError, match=r"data\.batch_size=4"):
        BatchPlan(numbered(0, 0, 0), batch_size=4, num_batches=1, seed=0)


# Arrays


def test_only_the_answers_are_learned(example, records):
    batch = Collator(example, (26, 40))(records[:6])
    labels, ids = batch["labels"], batch["input_ids"]
    learned = labels != -100
    np.testing.assert_array_equal(labels[learned], ids[learned])
    for row, record in enumerate(records[:6]):
        assert example.decode(labels[row][learned[row]]) == f"{record.answer}<|eot_id|>"
    assert not learned[batch["attention_mask"] == 0].any()
    assert {values.dtype.name for values in batch.values()} == {"int32", "float32"}
    assert batch["pixel_values"].shape[:2] == (6, 1)


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(example):
    turns = (
        ("system", "Be brief."),
        ("user", "Is 3 even or odd?"),
        ("assistant", "It is odd."),
        ("user", "<|eot_id|>And 4?"),
        ("assistant", "It is even."),
    )
    batch = Collator(example, (128,))([record(*turns)])
    [labels] = batch["labels"]
    assert example.decode(labels[labels != -100]) == "It is odd.<|eot_id|>It is even.<|eot_id|>"


def test_a_prompt_without_its_answer_has_the_ids_that_training_saw(example, records):
    batch = Collator(example, (40,))(records[1:2])
    prompt = example.apply_chat_template(list(records[1].question), add_generation_prompt=True)
    ids = example.tokenizer.encode(prompt)
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    assert batch["labels"][0, len(ids) - 1] == -100
    assert batch["labels"][0, len(ids)] != -100


def test_bos_that_the_template_leaves_out_shifts_nothing(example):
    template = example.chat_template.replace("{{- bos_token }}", "")
    bare = MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)
    one = record(("user", "Is 3 even or odd?"), ("assistant", "It is odd."))
    expected, found = (Collator(p, (40,))([one]) for p in (example, bare))
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(found["labels"], expected["labels"])


def test_rows_are_padded_to_the_smallest_length_that_fits(example, records):
    pictured = [record for record in records if record.images]
    assert Collator(example, (26, 40, 64))(pictured[:3])["input_ids"].shape == (3, 26)
    assert Collator(example, (8, 40, 64))(pictured[:3])["input_ids"].shape == (3, 40)
    with pytest.raises(DataError, match=r"train\.jsonl:2: \d+ tokens"):
        Collator(example, (8,))(records[1:2])


def test_a_template_that_rewrites_earlier_turns_is_refused(example):
    template = "{{ bos_token }}{{ messages | length }}{{ messages[-1]['content'] }}"
    odd = MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)
    one = record(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"here:1: messages\[1\]: the chat template"):
        Collator(odd, (40,))([one])


def with_template(example, template):
    return MllamaProcessor(example.image_processor, example.tokenizer, chat_template=template)


def test_a_conversation_that_the_template_refuses_is_named(example):
    strict = with_template(example, "{{ raise_exception('no system, please') }}")
    with pytest.raises(DataError, match=r"here:1: .*no system, please"):
        Collator(strict, (40,))([record(("user", "a"), ("assistant", "b"))])


def test_a_template_that_loses_pictures_is_refused(example, records):
    blind = with_template(example, example.chat_template.replace("<|image|>", ""))
    with pytest.raises(DataError, match=r"train\.jsonl:2: .* 0 <\|image\|> for 1 pictures"):
        Collator(blind, (40,))(records[1:2])


def test_answers_without_any_token_are_refused(example):
    endless = with_template(
        example,
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )
    one = record(("user", "a"), ("assistant", "b"))
    [labels] = Collator(endless, (8,))([one])["labels"]
    assert example.decode(labels[labels != -100]) == "b\n"
    silent = with_template(endless, endless.chat_template.replace("\n", ""))
    with pytest.raises(DataError, match=r"here:1: there is nothing to learn"):
        Collator(silent, (8,))([record(("user", "a"), ("assistant", ""))])


def test_templates_are_told_one_fixed_date(example):
    dated = with_template(example, "{{ date_string }}" + example.chat_template)
    one = record(("user", "a"), ("assistant", "b"))
    texts = [
        example.decode(batch["input_ids"][0], skip_special_tokens=True)
        for batch in (Collator(dated, (60,))([one]), Collator(dated, (60,), "1 May 2031")([one]))
    ]
    assert texts[0].startswith("26 Jul 2024")
    assert texts[1].startswith("1 May 2031")


def test_a_restored_iterator_goes_on_with_the_batches_that_would_have_come(example, records):
    config = DataConfig("", batch_size=4, lengths=(40,))
    dataset = make_dataset(records, example, config, steps=7, seed=5)
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    place = iterator.get_state()
    rest = [batch["input_ids"] for batch in iterator]
    other = iter(make_dataset(records, example, config, steps=7, seed=5))
    other.set_state(place)
    np.testing.assert_array_equal([batch["input_ids"] for batch in other], rest)
    assert len(rest) == 4


# Scores


def test_scores_are_counted_by_kind_and_compare_word_for_word(records):
    said = [Answer(record, record.answer) for record in records[:4]]
    said += [Answer(records[4], "It is odd."), Answer(records[5], "it is odd.")]
    by_kind = {score.kind: (score.right, score.asked) for score in scores(said)}
    assert by_kind == {"text only": (1, 2), "seen": (3, 4), "all": (4, 6)}
    assert list(by_kind)[-1] == "all"
    assert "75.0%" in table(scores(said))


def test_a_limit_takes_records_from_everywhere(records):
    assert chosen(records, None) == chosen(records, 99) == records
    few = chosen(records, 3)
    assert few[0] is records[0]
    assert few[-1] is records[-1]
    assert len(few) == 3
