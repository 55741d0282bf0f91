"""Configurations: transformers' fields and defaults, both generations of its file, validation."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers.models.mllama import configuration_mllama as hf

import mllama_jax as mj

PARTS = [
    (mj.MllamaVisionConfig, hf.MllamaVisionConfig),
    (mj.MllamaTextConfig, hf.MllamaTextConfig),
]
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# As in the released 11B instruct model's folder; "attention_heads" and the null are its own.
RELEASED: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "text_config": {
        "architectures": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "dropout": 0,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_size": 4096,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "intermediate_size": 14336,
        "model_type": "mllama_text_model",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "vision_config": {
        "attention_heads": 16,
        "decoder_start_token_id": None,
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 7680,
    },
}


def thawed(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(("ours", "theirs"), PARTS)
def test_fields_and_defaults_are_transformers(ours: type, theirs: type):
    documented = set(inspect.signature(theirs.__init__).parameters) - {"self", "kwargs"}
    fields = {field.name for field in dataclasses.fields(ours)} - {"extra"}
    assert fields == documented
    written, expected = thawed(ours().to_dict()), theirs().to_dict()
    for name in documented:
        name = "attention_heads" if (ours, name) == (PARTS[0][0], "num_attention_heads") else name
        assert written[name] == expected[name], name
    assert written["model_type"] == theirs.model_type


def test_whole_configuration_is_the_11b_model():
    config, expected = mj.MllamaConfig(), hf.MllamaConfig()
    assert config.vision_config == mj.MllamaVisionConfig()
    assert config.text_config == mj.MllamaTextConfig()
    assert config.image_token_index == config.image_token_id == expected.image_token_index == 128256
    assert set(inspect.signature(hf.MllamaConfig.__init__).parameters) == {
        *("self", "kwargs", "vision_config", "text_config", "image_token_index"),
    }
    text, vision = config.text_config, config.vision_config
    assert (text.head_dim, text.num_embeddings, vision.head_dim) == (128, 128264, 80)
    assert (vision.num_patches, vision.max_aspect_ratio_id) == (1025, 8)
    assert (text.unit_length, text.num_units) == (5, 8)


@pytest.mark.parametrize("number", [11, 90])
def test_sizes_of_the_released_models(number: int):
    text: dict[str, Any] = {}
    if number == 90:
        text = {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 100,
            "cross_attention_layers": list(range(3, 100, 5)),
        }
    config = mj.MllamaConfig({"image_size": 560}, text)
    shapes = mj.MllamaForConditionalGeneration(config).param_shapes()
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert f"{count / 1e9:.2f}" == {11: "10.67", 90: "88.59"}[number]


@pytest.mark.parametrize(
    ("layers", "count", "unit"),
    [
        ([3, 8, 13, 18], 20, 5),
        ([1, 4], 6, 3),
        ([1, 2, 5], 7, 7),
        ([], 4, 1),
        ([0, 1, 2], 3, 1),
        ([1, 3], 6, 6),
        ([4, 1], 6, 3),
    ],
)
def test_repeating_unit(layers: list[int], count: int, unit: int):
    config = mj.MllamaTextConfig(cross_attention_layers=layers, num_hidden_layers=count)
    assert (config.unit_length, config.num_units) == (unit, count // unit)
    expected = [i in layers for i in range(count)]
    assert [config.is_cross_attention_layer(i) for i in range(count)] == expected


def test_released_file_and_back(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = mj.MllamaConfig.from_pretrained(tmp_path)
    assert config.vision_config.num_attention_heads == 16
    assert config.vision_config.image_size == 560
    assert config.text_config.rope_scaling["original_max_position_embeddings"] == 8192
    assert config.text_config.eos_token_id == (128001, 128008, 128009)

    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert mj.MllamaConfig.from_pretrained(tmp_path / "again") == config
    # Every field of the file survives, also those that mean nothing here.
    for section in ("text_config", "vision_config"):
        kept = {name: written[section][name] for name in RELEASED[section]}
        assert kept == RELEASED[section]
    rest = {k: v for k, v in RELEASED.items() if not k.endswith("_config")}
    assert {name: written[name] for name in rest} == rest


def test_parts_are_taken_out_of_a_whole_file(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED))
    whole = mj.MllamaConfig.from_pretrained(file)
    assert mj.MllamaTextConfig.from_pretrained(file) == whole.text_config
    assert mj.MllamaVisionConfig.from_pretrained(tmp_path) == whole.vision_config
    for part in (whole.text_config, whole.vision_config):
        part.save_pretrained(tmp_path / part.model_type)
        assert type(part).from_pretrained(tmp_path / part.model_type) == part


def test_newer_generation(tmp_path: Path):
    """One ``rope_parameters`` field, ``dtype``, ``image_token_id``."""
    newer = thawed(RELEASED)
    text = newer["text_config"]
    parameters = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    newer["text_config"]["rope_parameters"] = parameters
    newer["image_token_id"] = newer.pop("image_token_index")
    (tmp_path / "config.json").write_text(json.dumps(newer))
    config = mj.MllamaConfig.from_pretrained(tmp_path)
    assert config == mj.MllamaConfig.from_dict(RELEASED)

    written = thawed(config.to_dict("rope_parameters"))
    assert written["text_config"]["rope_parameters"] == parameters
    assert not {"rope_theta", "rope_scaling"} & set(written["text_config"])
    assert mj.MllamaConfig.from_dict(written) == config
    config.save_pretrained(tmp_path, "rope_parameters")
    assert mj.MllamaConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("values", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
        ({"rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            7.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            500_000.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"rope_scaling": None, "rope_parameters": None}, 500_000.0, None),
        ({}, 500_000.0, None),
    ],
)
def test_spellings_of_rotary_settings(values: dict, theta: float, scaling: dict | None):
    config = mj.MllamaTextConfig.from_dict(values)
    assert config.rope_theta == theta
    assert config.to_dict()["rope_scaling"] == scaling
    for rope_format in ("rope_scaling", "rope_parameters"):
        assert mj.MllamaTextConfig.from_dict(config.to_dict(rope_format)) == config


def test_transformers_reads_what_we_write_and_back(tmp_path: Path):
    ours = mj.MllamaConfig.from_dict(RELEASED)
    ours.save_pretrained(tmp_path)
    theirs = hf.MllamaConfig.from_pretrained(tmp_path)
    assert theirs.vision_config.attention_heads == 16
    assert theirs.text_config.rope_scaling == LLAMA3_ROPE
    assert theirs.text_config.eos_token_id == [128001, 128008, 128009]
    theirs.save_pretrained(tmp_path / "again")
    back = mj.MllamaConfig.from_pretrained(tmp_path / "again")
    for part in ("vision_config", "text_config"):
        assert dataclasses.replace(getattr(back, part), extra={}) == dataclasses.replace(
            getattr(ours, part), extra={}
        )


def test_unknown_fields_survive():
    values = {
        "quantization_config": {"bits": [4, 8], "nested": {"a": None}},
        "vision_config": {"new_vision_field": [1, [2]]},
        "text_config": {"new_text_field": {"b": 1.5}},
    }
    config = mj.MllamaConfig.from_dict(values)
    written = thawed(config.to_dict())
    assert written["quantization_config"] == values["quantization_config"]
    assert written["vision_config"]["new_vision_field"] == [1, [2]]
    assert written["text_config"]["new_text_field"] == {"b": 1.5}
    assert "extra" not in written
    assert mj.MllamaConfig.from_dict(written) == config


def test_configurations_are_constants():
    config = mj.MllamaConfig.from_dict(RELEASED)
    assert hash(config) == hash(mj.MllamaConfig.from_dict(thawed(RELEASED)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.image_token_index = 3  # type: ignore[misc]
    changed = dataclasses.replace(config.text_config, num_hidden_layers=45)
    assert changed.num_hidden_layers == 45
    assert changed != config.text_config


TEXT, VISION, WHOLE = mj.MllamaTextConfig, mj.MllamaVisionConfig, mj.MllamaConfig
INVALID: list[tuple[type, dict[str, Any], str]] = [
    (TEXT, {"hidden_size": 0}, "hidden_size=0: expected a positive integer"),
    (TEXT, {"vocab_size": True}, "vocab_size=True: expected a positive integer"),
    (TEXT, {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: expected a positive integer"),
    (TEXT, {"intermediate_size": "14336"}, "intermediate_size='14336': expected a positive"),
    (TEXT, {"hidden_size": 4100}, "hidden_size=4100: expected num_attention_heads=32 times"),
    (TEXT, {"hidden_size": 96}, "hidden_size=96: .* an even head dimension"),
    (TEXT, {"num_key_value_heads": 5}, "num_attention_heads=32: .* num_key_value_heads=5"),
    (TEXT, {"num_hidden_layers": 38}, r"cross_attention_layers=\(3, .*38\): .*-1=37"),
    (TEXT, {"cross_attention_layers": [3, 3]}, r"cross_attention_layers=\(3, 3\): .*different"),
    (TEXT, {"cross_attention_layers": [-1]}, r"cross_attention_layers=\(-1,\)"),
    (TEXT, {"cross_attention_layers": ["3"]}, r"cross_attention_layers=\('3',\)"),
    (TEXT, {"cross_attention_layers": 3}, "cross_attention_layers=3"),
    (TEXT, {"tie_word_embeddings": True}, "tie_word_embeddings=True: expected False"),
    (TEXT, {"rope_theta": -1.0}, r"rope_theta=-1.0: expected a positive number"),
    (TEXT, {"rope_theta": None}, "rope_theta=None: expected a positive number"),
    (TEXT, {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': expected a positive number"),
    (TEXT, {"hidden_act": "swish2"}, "hidden_act='swish2': expected one of gelu"),
    (TEXT, {"rope_scaling": "linear"}, "rope_scaling='linear': expected a mapping"),
    (TEXT, {"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\['rope_type'\]='yarn'"),
    (TEXT, {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\['factor'\]=None"),
    (
        TEXT,
        {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 0}},
        r"rope_scaling\['low_freq_factor'\]=0: expected a positive number",
    ),
    (
        TEXT,
        {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
        r"rope_scaling\['high_freq_factor'\]=1.0: expected more than low_freq_factor=1.0",
    ),
    (VISION, {"hidden_size": 1281}, "hidden_size=1281: expected a multiple of num_attention_heads"),
    (VISION, {"image_size": 10}, "image_size=10: expected at least patch_size=14"),
    (VISION, {"num_hidden_layers": 30}, r"intermediate_layers_indices=\(3, .*, 30\): .*-1=29"),
    (VISION, {"intermediate_layers_indices": 3}, "intermediate_layers_indices=3: expected"),
    (VISION, {"vision_output_dim": 6400}, "vision_output_dim=6400: .* = 7680"),
    (VISION, {"max_num_tiles": 3}, "supported_aspect_ratios=.*max_num_tiles"),
    (VISION, {"max_num_tiles": 6}, "they must be given when max_num_tiles is not 4"),
    (VISION, {"supported_aspect_ratios": [[1, 2, 3]]}, r"supported_aspect_ratios=\(\(1, 2, 3\),\)"),
    (VISION, {"supported_aspect_ratios": [[0, 1]]}, r"supported_aspect_ratios=\(\(0, 1\),\)"),
    (VISION, {"supported_aspect_ratios": [[-1, -1]]}, r"supported_aspect_ratios=\(\(-1, -1\),\)"),
    (VISION, {"supported_aspect_ratios": [["1", 1]]}, r"supported_aspect_ratios=\(\('1', 1\),\)"),
    (VISION, {"supported_aspect_ratios": []}, r"supported_aspect_ratios=\(\)"),
    (VISION, {"norm_eps": 0}, "norm_eps=0: expected a positive number"),
    (VISION, {"hidden_act": None}, "hidden_act=None: expected one of"),
    (WHOLE, {"image_token_index": 128264}, "image_token_index=128264: .* 0 to 128263"),
    (WHOLE, {"image_token_index": None}, "image_token_index=None"),
    (WHOLE, {"text_config": 3}, "text_config=3: expected MllamaTextConfig, a mapping or None"),
    (WHOLE, {"text_config": {"hidden_size": -1}}, "MllamaTextConfig: hidden_size=-1"),
    (WHOLE, {"vision_config": {"model_type": "clip"}}, "model_type is 'clip', expected 'mllama_"),
]


@pytest.mark.parametrize(("config", "values", "message"), INVALID)
def test_errors_name_field_and_value(config: type, values: dict[str, Any], message: str):
    for build in (lambda: config(**values), lambda: config.from_dict(values)):
        with pytest.raises(ValueError, match=message):
            build()


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"hidden_act='x'.*; .*rope_scaling") as caught:
        mj.MllamaTextConfig(rope_theta=0, hidden_act="x", rope_scaling={"rope_type": "y"})
    assert "invalid MllamaTextConfig: rope_theta=0" in str(caught.value)


def test_unusable_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        mj.MllamaConfig.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json: not valid JSON"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ('{"model_type": "llama"}', "config.json: model_type is 'llama', expected 'mllama'"),
        ('{"text_config": {"vocab_size": 0}}', "config.json: .*vocab_size=0"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            mj.MllamaConfig.from_pretrained(tmp_path)
