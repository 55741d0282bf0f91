"""Checkpoints of transformers 4.54.1 in, checkpoints that it loads out."""

import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_checkpoint import (
    arrays,
    assert_equal_trees,
    part_config,
    random_params,
    save_tensors,
    stored,
    tiny_config,
)
from tiny_reference import PATTERNS, reference_model
from transformers.models import mllama as hf

import mllama_jax as mj
from mllama_jax.convert import CheckpointError, load_params, save_params
from mllama_jax.convert.lazy import Region
from mllama_jax.convert.sources.safetensors_files import StoredTensor
from mllama_jax.convert.table import COMPONENTS, row_of

PARTS = ("language_model", "text_model", "vision_model")


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory) -> Path:
    """A whole model as transformers saves it: float32, one file, Hub layout."""
    folder = tmp_path_factory.mktemp("reference")
    reference_model(PATTERNS["aperiodic"]).save_pretrained(folder)
    assert any(name.startswith("language_model.model.layers.") for name in stored(folder))
    return folder


def resaved(folder: Path, output: Path, dtype: str = "float32", **options) -> Path:
    """The whole model of a folder, loaded and saved by us."""
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(params, output, **options)
    return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, pattern, dtype):
    reference = reference_model(PATTERNS[pattern], getattr(torch, dtype))
    reference.save_pretrained(tmp_path / "single")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    expected = stored(tmp_path / "single")
    assert stored(resaved(tmp_path / "single", tmp_path / "ours", dtype)) == expected
    ours = resaved(tmp_path / "sharded", tmp_path / "ours in shards", dtype, max_shard_size="30KB")
    assert len(list(ours.glob("*.safetensors"))) > 3
    assert stored(ours) == expected
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    reference_index = json.loads(
        (tmp_path / "sharded" / "model.safetensors.index.json").read_text()
    )
    assert index["metadata"] == reference_index["metadata"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_layout_of_newer_versions_is_read(tmp_path, pattern):
    reference = reference_model(PATTERNS[pattern])
    reference.save_pretrained(tmp_path / "hub")
    newer = tmp_path / "newer"
    reference.config.save_pretrained(newer)
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in tensors
    safetensors.torch.save_file(tensors, newer / "model.safetensors")
    assert stored(resaved(newer, tmp_path / "ours")) == stored(tmp_path / "hub")


def test_transformers_loads_what_we_save(reference_folder, tmp_path):
    expected = reference_model(PATTERNS["aperiodic"]).state_dict()
    ours = resaved(reference_folder, tmp_path / "ours", max_shard_size="100KB")
    loaded, report = hf.MllamaForConditionalGeneration.from_pretrained(
        ours, output_loading_info=True, torch_dtype="auto"
    )
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("component", PARTS)
def test_a_part_is_taken_out_of_a_whole_checkpoint(reference_folder, tmp_path, component):
    architecture = COMPONENTS[component].architecture
    model, params = getattr(mj, architecture).from_pretrained(reference_folder)
    _, whole = mj.MllamaForConditionalGeneration.from_pretrained(reference_folder)
    expected = whole["vision_model" if component == "vision_model" else "language_model"]
    assert_equal_trees(params, expected["model"] if component == "text_model" else expected)

    model.save_pretrained(params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [architecture]
    loaded, report = getattr(hf, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for name, values in arrays(tmp_path).items():
        assert np.array_equal(loaded.state_dict()[name].numpy(), values), name
    assert len(loaded.state_dict()) == len(arrays(tmp_path))
    again, params_again = getattr(mj, architecture).from_pretrained(tmp_path)
    assert_equal_trees(params_again, params)
    assert again.config.to_dict().items() >= model.config.to_dict().items()


@pytest.mark.parametrize("component", PARTS)
def test_a_part_reads_none_of_the_others_tensors(reference_folder, monkeypatch, component):
    read, read_tensor = [], StoredTensor.read

    def read_and_note(tensor: StoredTensor, region: Region) -> np.ndarray:
        read.append(tensor.name)
        return read_tensor(tensor, region)

    monkeypatch.setattr(StoredTensor, "read", read_and_note)
    getattr(mj, COMPONENTS[component].architecture).from_pretrained(reference_folder)
    prefix = COMPONENTS[component].hub
    assert sorted(read) == sorted(n for n in stored(reference_folder) if n.startswith(prefix))


def test_other_parts_of_a_checkpoint_may_be_in_any_state(reference_folder, tmp_path):
    """A text model does not mind a quantised vision encoder."""
    tensors = arrays(reference_folder)
    for name in tensors:
        if row_of(name).hub.startswith("vision_model."):
            tensors[name] = np.zeros(3, np.int8)
    save_tensors(tensors, reference_folder, tmp_path)
    _, found = mj.MllamaForCausalLM.from_pretrained(tmp_path)
    _, expected = mj.MllamaForCausalLM.from_pretrained(reference_folder)
    assert_equal_trees(found, expected)
    with pytest.raises(CheckpointError, match="dtype int8"):
        mj.MllamaVisionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_on_load_as_torch_rounds_them(reference_folder, dtype):
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(
        reference_folder, dtype="float32", param_dtype=dtype
    )
    assert (model.dtype, model.param_dtype) == (np.float32, jnp.dtype(dtype))
    expected = reference_model(PATTERNS["aperiodic"], getattr(torch, dtype)).state_dict()
    assert_same_values(params["language_model"]["lm_head"]["kernel"].T, expected["lm_head.weight"])
    assert_same_values(
        params["vision_model"]["transformer"]["layers"]["mlp"]["fc1"]["kernel"][3].T,
        expected["model.vision_model.transformer.layers.3.mlp.fc1.weight"],
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def assert_same_values(found: jax.Array, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(np.float32(found), expected.float().numpy())


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    config = tiny_config()
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    for stored_dtype in (np.float32, jnp.bfloat16):
        params = random_params(config, dtype=stored_dtype)
        params["language_model"]["model"]["layers"]["block_0"]["mlp"]["up_proj"]["kernel"][1] = 1e6
        save_params(params, config, tmp_path, "model")
        with pytest.raises(CheckpointError, match=rf"{name}: holds values beyond float16"):
            load_params(tmp_path, config, "model", param_dtype="float16")


def test_without_a_dtype_each_leaf_keeps_its_own(tmp_path):
    config = tiny_config()
    params = random_params(config, dtype=jnp.bfloat16)
    gate = random_params(config)["vision_model"]["pre_tile_positional_embedding"]["gate"]
    params["vision_model"]["pre_tile_positional_embedding"]["gate"] = gate
    save_params(params, config, tmp_path, "model")
    assert_equal_trees(load_params(tmp_path, config, "model"), params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_loaded_tree_is_the_one_that_the_model_describes(tmp_path, component):
    config = part_config(tiny_config(cross_attention_layers=(0, 1, 4)), component)
    model = getattr(mj, COMPONENTS[component].architecture)(config, param_dtype=jnp.bfloat16)
    model.save_pretrained(random_params(config, component), tmp_path)
    _, params = type(model).from_pretrained(tmp_path, dtype="bfloat16")
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.param_shapes())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == described
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_the_modules_settings_are_passed_on(reference_folder):
    model, _ = mj.MllamaForCausalLM.from_pretrained(
        reference_folder, dtype=jnp.bfloat16, hf_masked_rows=True, attention="reference"
    )
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (model.hf_masked_rows, model.attention) == (True, "reference")


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", ["int8", "float64", "bf16", 3])
def test_unusable_dtypes_are_refused(reference_folder, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}={value!r}: expected one of float32, bf"):
        mj.MllamaForCausalLM.from_pretrained(reference_folder, **{argument: value})


def test_unknown_fields_of_a_configuration_survive_and_the_dtype_is_the_new_one(
    reference_folder, tmp_path
):
    values = json.loads((reference_folder / "config.json").read_text())
    values |= {"dtype": "float32", "torch_dtype": "float32", "someone's field": [1, {"a": None}]}
    values["text_config"] |= {"torch_dtype": "float32", "rope_scaling": None}
    source = tmp_path / "source"
    save_tensors(arrays(reference_folder), reference_folder, source)
    (source / "config.json").write_text(json.dumps(values))
    found = json.loads((resaved(source, tmp_path / "ours", "bfloat16") / "config.json").read_text())
    assert found["someone's field"] == [1, {"a": None}]
    assert found["torch_dtype"] == "bfloat16"
    assert "dtype" not in found
    assert "torch_dtype" not in found["text_config"]
    assert found["architectures"] == ["MllamaForConditionalGeneration"]
    assert found["model_type"] == "mllama"
    # transformers can't build a decoder from null, which says the same.
    assert found["text_config"]["rope_scaling"] == {"rope_type": "default"}
    loaded = hf.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", torch_dtype="auto"
    )
    assert loaded.dtype == torch.bfloat16


def test_trees_that_are_not_the_models_are_refused_with_all_reasons(tmp_path):
    config = tiny_config()
    params = flax.traverse_util.flatten_dict(random_params(config), sep="/")
    del params["multi_modal_projector/bias"]
    params["multi_modal_projector/bais"] = np.zeros(24, np.float32)
    params["vision_model/class_embedding"] = np.zeros(31, np.float32)
    params["language_model/lm_head/kernel"] = np.zeros((24, 61), np.int8)
    with pytest.raises(ValueError, match="not the parameters of MllamaForCond") as caught:
        save_params(
            flax.traverse_util.unflatten_dict(params, sep="/"), config, tmp_path / "x", "model"
        )
    assert str(caught.value).splitlines()[1:] == [
        "missing (1):",
        "  multi_modal_projector/bias   (nearest that is there: multi_modal_projector/bais)",
        "unexpected (1):",
        "  multi_modal_projector/bais",
        "misshaped (1):",
        "  vision_model/class_embedding: found (31,), expected (30,)",
        "unusable (1):",
        "  language_model/lm_head/kernel: dtype int8, expected float32, bfloat16, float16",
    ]
    assert not (tmp_path / "x").exists()
