"""How answers to held-out questions are counted, and which questions are asked."""

import pytest
from tiny_run import write_records

from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import Answer, chosen, scores, table


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "train.jsonl"
    write_records(file)
    return read_records(file)


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
