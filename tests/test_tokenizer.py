"""The tokenizer: the released model's ids, transformers' ids, and text that stays text."""

import json
import pickle
import random

import numpy as np
import pytest
from prompt_maker import PIECES, SPECIAL_PIECES, broken_tokens, random_text
from real_tokenizer import BOS, IMAGE, PAD
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from mllama_jax import MllamaTokenizer
from mllama_jax.processing.padding import as_arrays
from mllama_jax.processing.special_tokens import MARK

HAIKU = "<|image|>If I had to write a haiku for this one"
HAIKU_IDS = [128256, 2746, 358, 1047, 311, 3350, 264, 6520, 39342, 369, 420, 832]


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="module")
def hf(hf_processor):
    return hf_processor.tokenizer


@pytest.fixture
def small():
    """Words for tokens; quick to build, change and write."""
    return word_tokenizer()


# --- ids ------------------------------------------------------------------------------------------


def test_golden_ids(tokenizer):
    assert tokenizer.encode(HAIKU) == HAIKU_IDS
    assert len(tokenizer) == 128257
    assert tokenizer.vocab_size == 128000
    tokens = [BOS, "<|end_of_text|>", PAD, "<|start_header_id|>", "<|end_header_id|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [128000, 128001, 128004, 128006, 128007]
    tokens = ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>", IMAGE]
    assert tokenizer.convert_tokens_to_ids(tokens) == [128008, 128009, 128010, 128256]
    assert tokenizer.bos_token_id == 128000
    assert tokenizer.eos_token_id == 128009
    assert tokenizer.pad_token_id == 128004
    assert tokenizer.image_token_id == 128256
    assert tokenizer.unk_token_id is None


def test_ids_are_those_of_meta(tokenizer):
    from llama_models.llama3.tokenizer import Tokenizer

    meta = Tokenizer.get_instance()
    rng = random.Random(6)
    # Its reserved tokens and its image token have other ids.
    shared = tuple(t for t in SPECIAL_PIECES if "reserved" not in t and t != IMAGE)
    texts = [random_text(rng, PIECES * 3 + shared, most=12) for _ in range(200)]
    theirs = [meta.encode(text, bos=False, eos=False, allowed_special="all") for text in texts]
    assert tokenizer(texts)["input_ids"] == theirs


def test_ids_and_texts_are_those_of_transformers(tokenizer, hf):
    rng = random.Random(0)
    texts = [random_text(rng, PIECES * 3 + SPECIAL_PIECES, most=12) for _ in range(300)]
    assert tokenizer(texts)["input_ids"] == hf(texts)["input_ids"]
    for split in (False, True):
        ours = tokenizer(texts, split_special_tokens=split)["input_ids"]
        assert ours == [hf.encode(text, split_special_tokens=split) for text in texts]
        for skip in (False, True):
            assert tokenizer.batch_decode(ours, skip) == hf.batch_decode(ours, skip)
    ids = ours[7]
    assert tokenizer.convert_ids_to_tokens(ids) == hf.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == texts[7]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 9},
        {"padding": "max_length", "max_length": 6, "truncation": True},
        {"max_length": 5, "truncation": True},
        {"max_length": 5, "truncation": "longest_first", "padding": True},
        {"padding": True, "padding_side": "left"},
        {"padding": True, "add_special_tokens": False, "return_attention_mask": False},
    ],
    ids=str,
)
def test_padding_and_truncation_are_those_of_transformers(tokenizer, hf, options):
    texts = [HAIKU, "Hi", "", "one two three four five six"]
    ours, theirs = tokenizer(texts, **options), hf(texts, **options)
    assert dict(ours) == dict(theirs)


def test_truncation_side(processor_folder):
    left = MllamaTokenizer.from_pretrained(processor_folder, truncation_side="left")
    assert left.encode(HAIKU, truncation=True, max_length=3) == HAIKU_IDS[-3:]


def test_one_text_and_arrays(tokenizer):
    one = tokenizer(HAIKU)
    assert one["input_ids"] == HAIKU_IDS
    assert one["attention_mask"] == [1] * 12
    arrays = tokenizer(HAIKU, return_tensors="np")
    assert arrays.input_ids.shape == (1, 12)
    assert arrays.input_ids.dtype == np.int64
    arrays = tokenizer([HAIKU, "Hi"], padding=True, return_tensors="jax")
    assert arrays.attention_mask.sum(1).tolist() == [12, 1]
    assert arrays.input_ids.dtype == np.int32
    assert tokenizer.decode(arrays.input_ids[0]) == HAIKU
    assert tokenizer.decode(2746) == "If"
    assert tokenizer([])["input_ids"] == []


# --- text that stays text -------------------------------------------------------------------------


def test_escaped_text_is_encoded_without_special_tokens(tokenizer, hf):
    rng = random.Random(1)
    for _ in range(150):
        text = random_text(rng, PIECES[:20] + broken_tokens(rng))
        escaped = tokenizer.escape_special_tokens(text)
        ids = tokenizer.encode(escaped)
        assert max(ids, default=0) < 128000
        assert ids == hf.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unescape_special_tokens(escaped) == text


def test_escaped_neighbours_do_not_join_into_a_token(tokenizer):
    rng = random.Random(2)
    for _ in range(150):
        token = rng.choice(SPECIAL_PIECES)
        cuts = sorted(rng.sample(range(1, len(token)), 2))
        parts = [token[: cuts[0]], token[cuts[0] : cuts[1]], token[cuts[1] :]]
        parts = [part + " " * rng.randrange(2) for part in parts]
        escaped = [tokenizer.escape_special_tokens(part) for part in parts]
        for joined in ("".join(escaped), "".join(part.strip() for part in escaped)):
            assert max(tokenizer.encode(joined)) < 128000


def test_real_tokens_beside_escaped_ones(tokenizer):
    question = "what is <|image|> and <|eot_id|>?"
    prompt = f"<|image|>{BOS}{tokenizer.escape_special_tokens(question)}<|eot_id|>"
    ids = tokenizer.encode(prompt)
    assert ids[:2] == [128256, 128000]
    assert ids[-1] == 128009
    assert max(ids[2:-1]) < 128000
    assert tokenizer.decode(ids, skip_special_tokens=True) == question


def test_a_text_cannot_bring_its_own_escape(tokenizer):
    for text in (
        f"<{MARK}|image|>",
        f"<{MARK}{MARK}|image|>",
        f"{MARK}<{MARK}",
        "<\\ufdd0|image|>",
    ):
        escaped = tokenizer.escape_special_tokens(text)
        assert tokenizer.unescape_special_tokens(escaped) == text
        ids = tokenizer.encode(escaped)
        assert max(ids) < 128000
        assert tokenizer.decode(ids) == text


def test_tokens_that_cannot_be_escaped():
    tokenizer = word_tokenizer(additional_special_tokens=["§"])
    with pytest.raises(ValueError, match=r"'a § b' holds '§'.* one character"):
        tokenizer.escape_special_tokens("a § b")
    whole = word_tokenizer(additional_special_tokens=["pad"])
    with pytest.raises(ValueError, match=r"can't write \['pad'\] as ordinary text"):
        whole.encode(whole.escape_special_tokens("a pad"))


def test_unknown_words_are_not_taken_for_the_unknown_token():
    tokenizer = word_tokenizer()
    escaped = tokenizer.escape_special_tokens("zz <s> a")
    assert tokenizer.encode(escaped) == [0, 4, 5, 6, 1]
    assert tokenizer.encode(f"[UNK] <s>{escaped}") == [0, 8, 0, 4, 5, 6, 1]


# --- files ----------------------------------------------------------------------------------------


def test_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = MllamaTokenizer.from_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.special_tokens_map == tokenizer.special_tokens_map == theirs.special_tokens_map
    for name in ("padding_side", "model_max_length", "chat_template", "model_input_names"):
        assert getattr(again, name) == getattr(tokenizer, name) == getattr(theirs, name)
    assert again.clean_up_tokenization_spaces is theirs.clean_up_tokenization_spaces is True
    text = f"{HAIKU} <|eot_id|> ."
    assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text)
    assert pickle.loads(pickle.dumps(again)).encode(text) == tokenizer.encode(text)


def test_reads_what_transformers_writes(small, tmp_path):
    small.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    again = MllamaTokenizer.from_pretrained(tmp_path / "theirs")
    assert again.special_tokens_map == small.special_tokens_map == theirs.special_tokens_map
    assert again.encode("a <s> b zz") == small.encode("a <s> b zz") == [1, 8, 2, 0]


def test_everything_else_in_the_configuration_is_kept(tmp_path):
    small = word_tokenizer(
        processor_class="MllamaProcessor", legacy=None, added_by_us=[1, {"a": 2}]
    )
    small.save_pretrained(tmp_path)
    MllamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (tmp_path, tmp_path / "again")
    )
    assert first == again
    assert again["added_by_us"] == [1, {"a": 2}]
    assert again["processor_class"] == "MllamaProcessor"


def test_older_folders_declare_tokens_in_a_file_of_their_own(small, tmp_path):
    small.save_pretrained(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "name_or_path": "/home/somebody"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    declared = {"bos_token": token, "eos_token": "b", "additional_special_tokens": ["<x>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(declared))
    again = MllamaTokenizer.from_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again.all_special_tokens == theirs.all_special_tokens == ["<s>", "b", "<x>"]
    assert again.all_special_ids == theirs.all_special_ids
    assert again.encode("a <x> b") == theirs.encode("a <x> b")
    again.save_pretrained(tmp_path / "again")
    assert "somebody" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_named_tokens_are_added_to_the_vocabulary():
    tokenizer = word_tokenizer(
        eos_token={"content": "</s>", "rstrip": True},
        extra_special_tokens={"image_token": "<img>"},
        additional_special_tokens=[AddedToken("<y>", special=True)],
    )
    assert tokenizer.image_token == "<img>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a<img>b</s> <y>")) == [
        *("a", "<img>", "b", "</s>", "<y>"),
    ]
    assert tokenizer.special_tokens_map["additional_special_tokens"] == ["<y>"]
    assert word_tokenizer().image_token is None


def test_padding_that_tokenizer_json_declares():
    backend = word_tokenizer().backend
    backend.enable_padding(direction="left", pad_token="<pad>", pad_id=9)
    backend.enable_truncation(2, direction="left")
    tokenizer = MllamaTokenizer(backend)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer(["a b c", "a"])["input_ids"] == [[1, 2, 3], [1]]


# --- errors ---------------------------------------------------------------------------------------


def test_files_that_are_missing_or_broken(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json.*tokenizer\.model"):
        MllamaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        MllamaTokenizer.from_pretrained(tmp_path / "nowhere")
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["1"] = {"content": "<s>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"other ids.*<s>: 1, in fact 8"):
        MllamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' holds a list"):
        MllamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' is no JSON file"):
        MllamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json' is no tokenizer file"):
        MllamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "both"}, "padding='both'; expected one of"),
        ({"truncation": 3}, "truncation=3; expected one of"),
        ({"padding": "left", "padding_side": "right"}, "disagree"),
        ({"padding": True, "padding_side": "up"}, "'up'; expected 'left' or 'right'"),
        ({"max_length": 0}, "max_length=0; expected a number of tokens"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of=True; expected"),
        (
            {"padding": True, "truncation": True, "max_length": 5, "pad_to_multiple_of": 4},
            "contradict each other",
        ),
        ({"return_tensors": "pt"}, "return_tensors='pt'; expected None, 'np'"),
        ({"return_tensors": "np"}, r"have \[3, 1\] tokens.*padding=True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_make_no_sense(small, options, message):
    with pytest.raises(ValueError, match=message):
        small(["a b c", "a"], **options)


def test_text_and_ids_that_are_none(small):
    with pytest.raises(TypeError, match="text is a int"):
        small(3)
    with pytest.raises(TypeError, match=r"text\[1\] is a NoneType; text\[2\] is a list"):
        small(["a", None, ["b"]])
    with pytest.raises(ValueError, match=r"shape \(1, 2\).*batch_decode"):
        small.decode([[1, 2]])
    with pytest.raises(ValueError, match=r"int64 from -100 on\. Labels"):
        small.decode([1, -100])
    with pytest.raises(ValueError, match="float64"):
        small.decode([1.5])
    with pytest.raises(ValueError, match="no padding token"):
        word_tokenizer(pad_token=None)(["a", "a b"], padding=True)
    with pytest.raises(ValueError, match=r"declared as 3"):
        word_tokenizer(eos_token=3)
    with pytest.raises(ValueError, match="'middle'"):
        word_tokenizer(padding_side="middle")


def test_arrays_of_fields_that_are_not_ids():
    arrays = as_arrays({"scores": [[0.5], [1]]}, "np")
    assert arrays.scores.dtype == np.float32
