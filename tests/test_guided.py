"""Answers kept to JSON: whatever is drawn under the masks parses, and satisfies the schema."""

import json
import sys

import numpy as np
import pytest
from real_tokenizer import real_backend
from tokenizers.normalizers import Replace
from word_tokenizer import word_tokenizer

from mllama_jax import MllamaTokenizer
from mllama_jax.batch.guided import Guide, GuideFactory
from mllama_jax.batch.requests import RequestError

VOCAB_SIZE = 128256
ENDS = (128001, 128008, 128009)
JSON_OBJECT = {"type": "json_object"}
RECEIPT = {
    "type": "object",
    "properties": {
        "shop": {"type": "string", "minLength": 1, "maxLength": 12},
        "total": {"type": "number", "minimum": 0, "maximum": 999},
        "paid": {"type": "boolean"},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"name": {"enum": ["tea", "Brötchen"]}, "count": {"type": "integer"}},
                "required": ["name", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["shop", "total", "items"],
    "additionalProperties": False,
}


def schema(contents, **more):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": contents, **more}}


@pytest.fixture(scope="module")
def tokenizer():
    return MllamaTokenizer(real_backend(), eos_token="<|eot_id|>")


@pytest.fixture(scope="module")
def factory(tokenizer):
    return GuideFactory(tokenizer, VOCAB_SIZE, ENDS)


def unpacked(mask: np.ndarray) -> np.ndarray:
    """The ids that a mask allows, by its definition."""
    return np.flatnonzero([mask[i // 32] >> np.uint32(i % 32) & 1 for i in range(32 * len(mask))])


def drawn(guide: Guide, tokenizer: MllamaTokenizer, seed: int) -> list[int]:
    """Random tokens under the mask, often JSON's signs; after a while those that close it."""
    random = np.random.default_rng(seed)
    signs = np.array([tokenizer.encode(sign)[0] for sign in '"}]:,0{[-.e\\t'])
    ids: list[int] = []
    while not guide.is_finished:
        allowed = np.unpackbits(guide.mask().view(np.uint8), bitorder="little") == 1
        if len(ids) > 60 and allowed[list(ENDS)].all():
            return ids
        allowed[list(ENDS)] = False
        signs_now = signs[allowed[signs]]
        everything = np.flatnonzero(allowed)
        if len(ids) > 60:
            some = random.permutation(everything)[:100]
            black = (id for id in some if tokenizer.decode(id).strip())
            ids.append(int(signs_now[0] if len(signs_now) else next(black, some[0])))
        else:
            often = len(signs_now) and random.random() < 0.8
            ids.append(int(random.choice(signs_now if often else everything)))
        guide.accept(ids[-1])
        assert len(ids) < 400
    return ids


def check_receipt(value):
    assert value.keys() - {"paid"} == {"shop", "total", "items"}
    assert isinstance(value["shop"], str)
    assert 1 <= len(value["shop"]) <= 12
    assert type(value["total"]) in (int, float)
    assert 0 <= value["total"] <= 999
    assert type(value.get("paid", True)) is bool
    assert 1 <= len(value["items"]) <= 3
    for item in value["items"]:
        assert item.keys() == {"name", "count"}
        assert item["name"] in ("tea", "Brötchen")
        assert type(item["count"]) is int


@pytest.mark.parametrize("seed", range(6))
def test_random_draws_satisfy_the_schema(factory, tokenizer, seed):
    ids = drawn(factory.guide(schema(RECEIPT, strict=True)), tokenizer, seed)
    check_receipt(json.loads(tokenizer.decode(ids)))


@pytest.mark.parametrize("seed", range(6))
def test_random_draws_are_objects(factory, tokenizer, seed):
    ids = drawn(factory.guide(JSON_OBJECT), tokenizer, seed)
    assert type(json.loads(tokenizer.decode(ids))) is dict


def test_characters_split_over_tokens(factory, tokenizer):
    text = '{"é": "🦙 駱駝"}'
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([id]) for id in ids)
    guide = factory.guide(JSON_OBJECT)
    for id in ids:
        assert id in unpacked(guide.mask())
        guide.accept(id)
    assert guide.is_finished


def test_end_tokens_come_when_the_answer_is_complete_and_then_nothing_else(factory, tokenizer):
    guide = factory.guide(JSON_OBJECT)
    assert not np.isin(ENDS, unpacked(guide.mask())).any()
    for id in tokenizer.encode('{"a": 1}'):
        assert not guide.is_finished
        guide.accept(id)
    assert guide.is_finished
    assert tuple(unpacked(guide.mask())) == ENDS
    for _ in range(2):  # A request may go on behind an end token.
        guide.accept(ENDS[2])
        assert guide.is_finished
        assert tuple(unpacked(guide.mask())) == ENDS


def test_masks_have_a_word_for_32_logits_and_no_bit_behind_the_vocabulary(tokenizer):
    factory = GuideFactory(tokenizer, VOCAB_SIZE + 64 + 3, ENDS)
    mask = factory.guide(schema({"type": "string"})).mask()
    assert mask.dtype == np.uint32
    assert len(mask) == VOCAB_SIZE // 32 + 3
    assert unpacked(mask).max() < 128000  # No special token, no image token, no id without a text.


def test_tokens_without_a_logit_have_no_bit(tokenizer):
    size = 1000  # Not a multiple of 32.
    guide = GuideFactory(tokenizer, size, ENDS).guide(schema({"type": "string"}))
    guide.accept(tokenizer.encode('"')[0])
    mask = guide.mask()
    assert len(mask) == 32
    assert unpacked(mask).max() == size - 1


def test_guides_of_one_form_do_not_share_their_state(factory, tokenizer):
    first, second = factory.guide(JSON_OBJECT), factory.guide(JSON_OBJECT)
    before = second.mask()
    first.accept(tokenizer.encode("{")[0])
    assert (first.mask() != before).any()
    np.testing.assert_array_equal(second.mask(), before)
    np.testing.assert_array_equal(factory.guide(JSON_OBJECT).mask(), before)


def test_tokens_that_the_mask_forbids_are_refused(factory, tokenizer):
    guide = factory.guide(JSON_OBJECT)
    with pytest.raises(RequestError, match="could not be kept to its form") as caught:
        guide.accept(tokenizer.encode("hello")[0])
    assert caught.value.status_code == 500


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, r"response_format\.type is 'xml'; expected 'json_object'"),
        ({}, r"response_format\.type is None"),
        ({"type": "json_schema"}, r"json_schema\.schema is None; expected an object"),
        ({"type": "json_schema", "json_schema": []}, r"schema is None; expected an object"),
        (schema(["string"]), r"schema is \['string'\]; expected an object"),
        (schema({"type": "strnig"}), r"schema can't be kept to: .*strnig"),
        (schema({"not": {"type": "string"}}), r"schema can't be kept to: .*not"),
        (schema({"type": "string", "pattern": "("}), r"schema can't be kept to: .*regex"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "can't be kept to: Unsatisf"),
        (schema({"$ref": "#/nowhere"}), "can't be kept to: .*/nowhere"),
    ],
)
def test_unusable_forms_are_the_requests_fault(factory, response_format, message):
    with pytest.raises(RequestError, match=message) as caught:
        factory.guide(response_format)
    assert (caught.value.field, caught.value.status_code) == ("response_format", 400)


def test_tokenizers_whose_tokens_are_not_bytes_are_refused():
    factory = GuideFactory(word_tokenizer(), 8, [6])
    with pytest.raises(RequestError, match="needs a tokenizer of byte-level tokens"):
        factory.guide(JSON_OBJECT)


def test_tokenizers_that_spell_text_otherwise_are_refused():
    backend = real_backend()
    backend.normalizer = Replace("é", "e")
    with pytest.raises(RequestError, match=r"byte-level tokens, .* comes back as b'"):
        GuideFactory(MllamaTokenizer(backend), VOCAB_SIZE, ENDS).guide(JSON_OBJECT)


def test_without_the_library_the_error_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    factory = GuideFactory(tokenizer, VOCAB_SIZE, ENDS)
    with pytest.raises(RequestError, match=r"pip install 'mllama-jax\[guided\]'") as caught:
        factory.guide(JSON_OBJECT)
    assert caught.value.status_code == 500
    with pytest.raises(RequestError, match="type is 'xml'"):
        factory.guide({"type": "xml"})
