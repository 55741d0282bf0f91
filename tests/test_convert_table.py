"""The table between Hugging Face's tensors and our tree, against models of all sizes."""

import math
import time
from collections import Counter

import flax.traverse_util
import numpy as np
import pytest
import torch
from tiny_checkpoint import part_config, tiny_config
from transformers.models.mllama import MllamaConfig as HFConfig
from transformers.models.mllama import MllamaForConditionalGeneration as HFModel

import mllama_jax as mj
from mllama_jax.convert.lazy import ArrayTensor, read_whole
from mllama_jax.convert.table import COMPONENTS, ROWS, row_of, spelled, spellings, tensors

IN_MEMORY = "transformers 4.52 and later, in memory"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def released(size: str, image_size: int) -> mj.MllamaConfig:
    text = {"rope_scaling": LLAMA3_ROPE}
    if size == "90B":
        text |= {
            "hidden_size": 8192,
            "num_hidden_layers": 100,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "cross_attention_layers": tuple(range(3, 100, 5)),
        }
    return mj.MllamaConfig({"image_size": image_size}, text)


def our_shapes(config: mj.MllamaConfig, component: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    model_cls = getattr(mj, COMPONENTS[component].architecture)
    shapes = model_cls(part_config(config, component)).param_shapes()
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}


@pytest.mark.parametrize(
    ("size", "image_size", "parameters", "checkpoint_tensors"),
    [
        ("11B", 448, 10_642_941_475, 906),
        ("11B", 560, 10_670_220_835, 906),
        ("90B", 448, 88_566_075_963, 1494),
        ("90B", 560, 88_593_355_323, 1494),
    ],
)
def test_released_models_have_the_published_names_and_shapes(
    size, image_size, parameters, checkpoint_tensors
):
    config = released(size, image_size)
    start = time.monotonic()
    shapes = our_shapes(config, "model")
    table = tensors(config, "model")
    assert time.monotonic() - start < 20

    assert {tensor.path: tensor.leaf_shape for tensor in table} == shapes
    assert sum(map(math.prod, shapes.values())) == parameters
    assert sum(math.prod(tensor.hub_shape) for tensor in table) == parameters
    assert len(table) == checkpoint_tensors

    hf_config = HFConfig.from_dict(config.to_dict())
    with torch.device("meta"):
        reference = HFModel(hf_config).state_dict()
    assert {spelled(tensor.hub, IN_MEMORY): tensor.hub_shape for tensor in table} == {
        name: tuple(tensor.shape) for name, tensor in reference.items()
    }


@pytest.mark.parametrize("component", ["language_model", "text_model", "vision_model"])
def test_parts_of_a_released_model_have_the_tables_leaves(component):
    config = released("11B", 560)
    table = tensors(config, component)
    assert {tensor.path: tensor.leaf_shape for tensor in table} == our_shapes(config, component)
    assert table == tensors(part_config(config, component), component)


@pytest.mark.parametrize(
    "cross_attention_layers", [(), (1, 4), (0, 1, 2, 3, 4, 5), (2,), (0, 1, 4), (5, 1)]
)
def test_every_place_of_a_leaf_is_filled_once(cross_attention_layers):
    config = tiny_config(cross_attention_layers=cross_attention_layers)
    table = tensors(config, "model")
    shapes = our_shapes(config, "model")
    assert {tensor.path: tensor.leaf_shape for tensor in table} == shapes
    places = Counter((tensor.path, tensor.index) for tensor in table)
    assert places == Counter(
        (tensor.path, index)
        for tensor in {tensor.path: tensor for tensor in table}.values()
        for index in ([None] if tensor.stack_size is None else range(tensor.stack_size))
    )
    assert len({tensor.hub for tensor in table}) == len(table)


def test_layers_lie_where_the_decoder_looks_for_them():
    table = {tensor.hub: tensor for tensor in tensors(tiny_config(), "model")}
    name = "language_model.model.layers.{}.{}.q_proj.weight"
    # Units of self, cross, self: layer 4 is the second block of the second unit.
    places = {
        layer: (tensor.path[3:5], tensor.index)
        for layer, kind in enumerate(["self_attn", "cross_attn", "self_attn"] * 2)
        for tensor in [table[name.format(layer, kind)]]
    }
    assert places == {
        0: (("block_0", "self_attn"), 0),
        1: (("block_1", "cross_attn"), 0),
        2: (("block_2", "self_attn"), 0),
        3: (("block_0", "self_attn"), 1),
        4: (("block_1", "cross_attn"), 1),
        5: (("block_2", "self_attn"), 1),
    }


# What our layers compute with each kind of parameter, written without the table's notation.
HUB_TO_OURS = {
    "self_attn.q_proj.weight": lambda w: w.T.reshape(24, 6, 4),
    "self_attn.k_proj.weight": lambda w: w.T.reshape(24, 3, 4),
    "self_attn.v_proj.weight": lambda w: w.T.reshape(24, 3, 4),
    "self_attn.o_proj.weight": lambda w: w.T.reshape(6, 4, 24),
    "mlp.gate_proj.weight": lambda w: w.T,
    "mlp.up_proj.weight": lambda w: w.T,
    "mlp.down_proj.weight": lambda w: w.T,
    "language_model.lm_head.weight": lambda w: w.T,
    "language_model.model.embed_tokens.weight": lambda w: w,
    "multi_modal_projector.weight": lambda w: w.T,
    "patch_embedding.weight": lambda w: w.transpose(2, 3, 1, 0),
    "gated_positional_embedding.tile_embedding.weight": lambda w: w.reshape(9, 4, 10, 30),
    "pre_tile_positional_embedding.embedding.weight": lambda w: w.reshape(9, 4, 30),
    "vision_model.transformer.layers.3.mlp.fc1.weight": lambda w: w.T,
    "vision_model.global_transformer.layers.1.self_attn.o_proj.weight": (
        lambda w: w.T.reshape(2, 15, 30)
    ),
    "cross_attn.k_proj.weight": lambda w: w.T.reshape(24, 3, 4),
    "cross_attn.q_norm.weight": lambda w: w,
    "cross_attn_attn_gate": lambda w: w,
}


def test_axes_are_moved_as_our_layers_need_them_and_back():
    table = tensors(tiny_config(), "model")
    seen = set()
    for tensor in table:
        values = np.arange(math.prod(tensor.hub_shape)).reshape(tensor.hub_shape)
        ours = read_whole(tensor.to_ours(ArrayTensor(values)))
        assert ours.shape == tensor.shape
        back = read_whole(tensor.to_hub(ArrayTensor(ours)))
        np.testing.assert_array_equal(back, values, err_msg=tensor.hub)
        for suffix, expected in HUB_TO_OURS.items():
            decoder = tensor.hub.startswith("language_model.")
            if tensor.hub.endswith(suffix) and (decoder or not suffix.startswith("self_attn")):
                np.testing.assert_array_equal(ours, expected(values), err_msg=tensor.hub)
                seen.add(suffix)
    assert seen == HUB_TO_OURS.keys()


def test_a_name_belongs_to_one_row_in_every_layout():
    names = Counter(name for row in ROWS for name in spellings(row.hub))
    assert names.most_common(1)[0][1] == 1
    for tensor in tensors(tiny_config(), "model"):
        rows = {row_of(name) for name in spellings(tensor.hub)}
        assert len(rows) == 1
        assert None not in rows
    assert row_of("language_model.model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert row_of("language_model.model.layers.x.input_layernorm.weight") is None


def test_wrong_components_and_configurations_are_named():
    with pytest.raises(ValueError, match=r"component='decoder': expected one of model, language_"):
        tensors(tiny_config(), "decoder")
    with pytest.raises(TypeError, match=r"expected MllamaTextConfig or .* found MllamaVisionC"):
        tensors(tiny_config().vision_config, "text_model")
    with pytest.raises(TypeError, match=r"expected MllamaVisionConfig or .* found MllamaTextC"):
        tensors(tiny_config().text_config, "model")
