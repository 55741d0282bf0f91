"""Reading, checking, changing and writing generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

import mllama_jax as mj

RELEASED = {
    "_from_model_config": True,
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": 128004,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}
"""As it comes with Llama-3.2-11B-Vision-Instruct."""


def write(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text)
    return folder


def test_released_file_survives_a_round_trip(tmp_path: Path):
    config = mj.GenerationConfig.from_pretrained(write(tmp_path, json.dumps(RELEASED)))
    assert config.do_sample
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert (config.temperature, config.top_p, config.top_k) == (0.6, 0.9, 50)
    assert config.extra["transformers_version"] == "4.45.0.dev0"
    assert config.unsupported() == {}
    config.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/generation_config.json").read_text()) == RELEASED
    assert mj.GenerationConfig.from_pretrained(tmp_path / "new/generation_config.json") == config


def test_none_survives_a_round_trip():
    config = mj.GenerationConfig(top_k=None, max_length=None, eos_token_id=[3, 4])
    assert config.to_dict() == {"top_k": None, "max_length": None, "eos_token_id": [3, 4]}
    assert mj.GenerationConfig.from_dict(config.to_dict()) == config


def test_equal_configurations_have_equal_hashes():
    one, two = (mj.GenerationConfig.from_dict(RELEASED | {"more": {"a": [1]}}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize("whole", [True, False])
def test_special_tokens_of_a_model_configuration(whole: bool):
    text = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    config = mj.MllamaConfig(text_config=text) if whole else mj.MllamaTextConfig(**text)
    found = mj.GenerationConfig.from_model_config(config)
    assert found == mj.GenerationConfig(bos_token_id=5, eos_token_id=(6, 7), pad_token_id=8)


def test_one_or_several_or_none():
    one = mj.GenerationConfig(eos_token_id=3, stop_strings="end")
    assert (one.eos_token_ids, one.all_stop_strings) == ((3,), ("end",))
    several = mj.GenerationConfig(eos_token_id=[3, 4], stop_strings=["end", "\n"])
    assert (several.eos_token_ids, several.all_stop_strings) == ((3, 4), ("end", "\n"))
    none = mj.GenerationConfig()
    assert (none.eos_token_ids, none.all_stop_strings) == ((), ())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_length", 0, "an integer of at least 1, or None"),
        ("max_new_tokens", 2.5, "an integer of at least 1, or None"),
        ("max_new_tokens", True, "an integer"),
        ("min_new_tokens", -1, "an integer of at least 0"),
        ("do_sample", 1, "True or False"),
        ("temperature", -0.5, "a positive number"),
        ("temperature", float("nan"), "a positive number"),
        ("temperature", "hot", "a positive number"),
        ("top_k", -1, "an integer of at least 0"),
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.5, "greater than 0 and at most 1"),
        ("min_p", 1.1, "a number from 0"),
        ("eos_token_id", "2", "a token id"),
        ("eos_token_id", [1, -2], "a token id"),
        ("pad_token_id", [0], "a token id or None"),
        ("stop_strings", "", "a text that isn't empty"),
        ("stop_strings", [3], "a text that isn't empty"),
    ],
)
def test_unusable_values(name: str, value: Any, expected: str):
    with pytest.raises(ValueError, match=f"invalid GenerationConfig: {name}=.*{expected}"):
        mj.GenerationConfig(**{name: value})


def test_all_unusable_values_are_named_with_the_file(tmp_path: Path):
    write(tmp_path, '{"top_p": 7, "top_k": -3}')
    with pytest.raises(ValueError, match=r"generation_config\.json: .*top_k=-3.*top_p=7"):
        mj.GenerationConfig.from_pretrained(tmp_path)


def test_temperature_zero_only_without_a_draw():
    assert mj.GenerationConfig(temperature=0.0).temperature == 0
    with pytest.raises(ValueError, match="for the most likely token at each step use do_sample"):
        mj.GenerationConfig(temperature=0.0, do_sample=True)


def test_replace():
    config = mj.GenerationConfig.from_dict(RELEASED).replace(top_p=None, max_new_tokens=3)
    assert (config.top_p, config.max_new_tokens, config.temperature) == (None, 3, 0.6)
    assert config.extra["_from_model_config"] is True


def test_replace_suggests_the_name_that_was_meant():
    with pytest.raises(TypeError, match=r"'max_tokens' \(did you mean 'max_new_tokens'\?\), 'zz'"):
        mj.GenerationConfig().replace(max_tokens=3, zz=1)


def test_unsupported_settings_are_found():
    values = {"num_beams": 4, "num_return_sequences": 1, "repetition_penalty": 1.2, "novel": 3}
    config = mj.GenerationConfig.from_dict(values)
    assert config.unsupported() == {"num_beams": 4, "repetition_penalty": 1.2}
    assert config.to_dict() == values


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face generation_config"):
        mj.GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not valid JSON"):
        mj.GenerationConfig.from_pretrained(write(tmp_path, "{"))
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        mj.GenerationConfig.from_pretrained(write(tmp_path, "[]"))
