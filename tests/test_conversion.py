"""Conversions between Hugging Face and Orbax, from end to end."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from tiny_checkpoint import assert_equal_trees, random_params, stored, tiny_config
from tiny_reference import PATTERNS, reference_model
from transformers import AutoProcessor
from transformers.models import mllama as hf

import mllama_jax as mj
from mllama_jax.convert import convert, load_params, open_source, plan_conversion, save_params

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "model"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model", max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_orbax_and_back_bit_for_bit(tmp_path, pattern, dtype):
    reference_model(PATTERNS[pattern], getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    expected = stored(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert (tmp_path / "orbax" / "orbax.checkpoint").exists()
    assert stored(tmp_path / "back") == expected
    loaded, report = hf.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True, torch_dtype="auto"
    )
    assert not any(report.values()), report
    assert loaded.dtype == getattr(torch, dtype)


def test_names_of_newer_versions_become_those_of_the_hub(tmp_path):
    reference = reference_model(PATTERNS["periodic"])
    reference.save_pretrained(tmp_path / "hub")
    newer = tmp_path / "newer"
    newer.mkdir()
    reference.config.save_pretrained(newer)
    torch.save(reference.state_dict(), newer / "pytorch_model.bin")
    assert "model.language_model.norm.weight" in open_source(newer).tensors
    convert(newer, tmp_path / "converted", to="hf")
    assert stored(tmp_path / "converted") == stored(tmp_path / "hub")


def test_a_real_model_with_all_that_belongs_to_it(tmp_path):
    convert(DIGITS, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", max_shard_size="1MB")
    left_out = {"config.json", "model.safetensors", "README.md"}
    for file in DIGITS.iterdir():
        if file.name not in left_out:
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert hf.MllamaConfig.from_pretrained(tmp_path / "back")
    AutoProcessor.from_pretrained(tmp_path / "back")
    hf.MllamaForConditionalGeneration.from_pretrained(tmp_path / "back")

    processor = mj.MllamaProcessor.from_pretrained(tmp_path / "orbax")
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(tmp_path / "orbax")
    _, expected = mj.MllamaForConditionalGeneration.from_pretrained(DIGITS)
    assert_equal_trees(params, expected)
    message = [{"role": "user", "content": [{"type": "text", "text": "What is two and two?"}]}]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    assert model.generate(params, **inputs, max_new_tokens=2).new_tokens.shape == (1, 2)


def test_every_part_of_the_model_may_have_a_dtype(source, tmp_path):
    dtypes = {"multi_modal_projector": "float32", "language_model": "bfloat16"}
    for to in ("hf", "orbax"):
        convert(source, tmp_path / to, to=to, dtype="float16", dtypes=dtypes)
        found = open_source(tmp_path / to).tensors
        expected = {"vision_model": "float16", **dtypes}
        assert {(name.split(".")[0], str(tensor.dtype)) for name, tensor in found.items()} == {
            *expected.items()
        }
    # That of most values.
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    values = load_params(tmp_path / "hf", tiny_config(), "model")
    assert_equal_trees(load_params(tmp_path / "orbax", tiny_config(), "model"), values)
    kernel = random_params(tiny_config())["multi_modal_projector"]["kernel"]
    np.testing.assert_array_equal(values["multi_modal_projector"]["kernel"], kernel)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_language_model_alone(source, tmp_path, to):
    report = convert(source, tmp_path / "text", to=to, text_only=True)
    whole = open_source(source)
    assert report.num_tensors == sum(n.startswith("language_model.") for n in whole.tensors)
    _, expected = mj.MllamaForCausalLM.from_pretrained(source)
    _, found = mj.MllamaForCausalLM.from_pretrained(tmp_path / "text")
    assert_equal_trees(found, expected)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["architectures"] == ["MllamaForCausalLM"]
    convert(tmp_path / "text", tmp_path / "again", to="orbax", text_only=True)
    _, again = mj.MllamaForCausalLM.from_pretrained(tmp_path / "again")
    assert_equal_trees(again, expected)


def test_where_a_result_comes_from(source, tmp_path):
    convert(source, tmp_path / "result", to="hf", dtype="bfloat16")
    found = json.loads((tmp_path / "result" / "provenance.json").read_text())
    assert found["source"]["path"] == str(source)
    assert found["options"]["dtypes"] == dict.fromkeys(
        ("vision_model", "multi_modal_projector", "language_model"), "bfloat16"
    )
    assert found["tool"]["name"] == "mllama_jax"
    assert found["tool"]["mapping_version"] == 1
    for folder, files in (
        (source, found["source"]["files"]),
        (tmp_path / "result", found["files"]),
    ):
        assert {*files} == {file.name for file in folder.glob("*.safetensors")}
        for name, entry in files.items():
            assert entry["sha256"] == sha256(folder / name)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_plan_reads_headers_and_writes_nothing(source, tmp_path):
    plan = plan_conversion(source, tmp_path / "result", to="orbax")
    assert plan.total_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(random_params(tiny_config()))
    )
    assert {output.source for output in plan.outputs} == {*open_source(source).tensors}
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "to='gguf': expected orbax, hf or meta"),
        ({"dtype": "int8"}, "dtype='int8': expected one of"),
        ({"dtypes": {"vision": "float32"}}, "'vision' is no part; expected vision_model"),
        ({"dtypes": {"vision_model": "float32"}, "text_only": True}, "has no vision_model"),
        ({"base": "somewhere"}, "is no LoRA adapter"),
        ({"max_shard_size": "large", "to": "hf"}, "max_shard_size='large': expected bytes"),
        ({"to": "meta"}, "Meta"),
    ],
)
def test_unusable_options(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "result", **options)
    assert not (tmp_path / "result").exists()
