"""The vision encoder against transformers': embeddings, layers, the whole tower, the projector."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from closeness import assert_close, relative_difference
from hf_reference import Batch, Pair, make_batch, to_torch
from transformers.models.mllama.modeling_mllama import (
    MllamaVisionAttention,
    _prepare_aspect_ratio_attention_mask,
)

import mllama_jax as mj
from mllama_jax.execution import Execution
from mllama_jax.masks import PaddingPairMask
from mllama_jax.tiles import tiles_of_aspect_ratios
from mllama_jax.vision import PositionEmbedding, TileEmbedding, VisionLayer

IMAGES = {
    # Three, one and no image; two tiles an image and two images each.
    "aperiodic": ([[1, 3, 6], [2], []], [11, 9, 7]),
    "periodic": ([[1, 3], [0, 2]], [6, 5]),
}
VISION_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@pytest.fixture(scope="module", params=["aperiodic", "periodic"])
def case(request: pytest.FixtureRequest) -> tuple[Pair, Batch]:
    pair = request.getfixturevalue(request.param)
    batch = make_batch(pair.config, *IMAGES[request.param], "right", seed=5)
    return pair, {name: batch[name] for name in VISION_INPUTS}


@contextmanager
def recorded_weights(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The attention weights of each call inside; transformers 4.54.1 loses them on the way."""
    weights: list[torch.Tensor] = []
    hooks = []
    for module in model.modules():
        if isinstance(module, MllamaVisionAttention):
            ask = lambda _, arguments, named: (arguments, {**named, "output_attentions": True})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda *call: weights.append(call[-1][1])))
    yield weights
    for hook in hooks:
        hook.remove()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def one_hot(pair: Pair, ids: np.ndarray) -> np.ndarray:
    return np.eye(pair.vision_config.max_aspect_ratio_id + 1, dtype=np.float32)[ids]


@pytest.mark.parametrize("place", ["pre", "post"])
def test_tile_embedding(case: tuple[Pair, Batch], place: str):
    pair, _ = case
    name = f"{place}_tile_positional_embedding"
    config = pair.vision_config
    ids = np.arange(config.max_aspect_ratio_id + 1)
    x = normal(len(ids), config.max_num_tiles, 3, config.hidden_size)
    reference = getattr(pair.reference.model.vision_model, name)
    params = pair.params["vision_model"][name]
    ours = TileEmbedding(config, Execution())
    with torch.no_grad():
        expected = reference(torch.from_numpy(x), torch.from_numpy(ids[:, None]))
    assert_close(ours.apply({"params": params}, x, one_hot(pair, ids)), expected)


def test_position_embedding(case: tuple[Pair, Batch]):
    pair, _ = case
    config = pair.vision_config
    ids = np.arange(config.max_aspect_ratio_id + 1)
    x = normal(len(ids), config.max_num_tiles, config.num_patches, config.hidden_size)
    reference = pair.reference.model.vision_model.gated_positional_embedding
    params = pair.params["vision_model"]["gated_positional_embedding"]
    ours = PositionEmbedding(config, Execution())
    with torch.no_grad():
        expected = reference(torch.from_numpy(x), torch.from_numpy(ids[:, None]))
    assert_close(ours.apply({"params": params}, x, one_hot(pair, ids)), expected)


@pytest.mark.parametrize("stack", ["transformer", "global_transformer"])
def test_layer(case: tuple[Pair, Batch], stack: str):
    pair, _ = case
    config = pair.vision_config
    tiles, patches, padded = 2, 5, 8
    x = normal(3, tiles * padded, config.hidden_size)
    tile_mask = np.array([[1, 1], [1, 0], [0, 1]])
    real = np.arange(padded) < patches
    padding = ~(tile_mask[:, :, None].astype(bool) & real).reshape(3, -1)
    reference = getattr(pair.reference.model.vision_model, stack).layers[1]
    params = jax.tree.map(lambda leaf: leaf[1], pair.params["vision_model"][stack]["layers"])
    with torch.no_grad():
        mask = _prepare_aspect_ratio_attention_mask(
            torch.from_numpy(tile_mask), patches, padded, torch.float32
        )
        with recorded_weights(reference) as expected_weights:
            (expected,) = reference(torch.from_numpy(x), mask)
    for output_attentions in (False, True):
        layer = VisionLayer(
            *(config, stack == "global_transformer", Execution()),
            output_hidden_states=False,
            output_attentions=output_attentions,
        )
        run = jax.jit(layer.apply)
        (out, _), (_, weights) = run(
            {"params": params}, (x, None), None, PaddingPairMask(jnp.asarray(padding))
        )
        assert_close(out, expected, f"output, output_attentions={output_attentions}")
    assert_close(weights, expected_weights[0], "weights")


@pytest.fixture(scope="module")
def tower(case: tuple[Pair, Batch]) -> tuple[Pair, Batch, Any, Any]:
    """The tower alone, taken out of the whole checkpoint, and what both compute."""
    pair, batch = case
    vision = pair.reference.model.vision_model
    with torch.no_grad(), recorded_weights(vision) as weights:
        expected = vision(**to_torch(batch), output_hidden_states=True)
    expected.attentions = weights
    model, params = mj.MllamaVisionModel.from_pretrained(pair.folder)

    @jax.jit
    def run(params: dict, batch: Batch):
        everything = model.apply(
            {"params": params}, **batch, output_hidden_states=True, output_attentions=True
        )
        return everything, model.apply({"params": params}, **batch)

    return pair, batch, run(params, batch), expected


def test_last_hidden_state(tower: tuple[Pair, Batch, Any, Any]):
    pair, batch, (everything, alone), expected = tower
    config = pair.vision_config
    assert alone.hidden_states is None
    assert alone.attentions is None
    shape = (*batch["pixel_values"].shape[:3], config.num_patches, config.vision_output_dim)
    assert alone.last_hidden_state.shape == shape
    assert_close(alone.last_hidden_state, expected.last_hidden_state)
    assert_close(everything.last_hidden_state, expected.last_hidden_state)


def test_hidden_states_and_attentions(tower: tuple[Pair, Batch, Any, Any]):
    pair, _, (everything, _), expected = tower
    config = pair.vision_config
    taps, layers = len(config.intermediate_layers_indices), config.num_global_layers
    assert len(everything.hidden_states) == len(expected.hidden_states) == taps + layers + 1
    assert len(everything.attentions) == len(expected.attentions)
    for i, pair_of in enumerate(zip(everything.hidden_states, expected.hidden_states, strict=True)):
        assert_close(*pair_of, f"hidden_states[{i}]")
    for i, pair_of in enumerate(zip(everything.attentions, expected.attentions, strict=True)):
        assert_close(*pair_of, f"attentions[{i}]")


def test_intermediate_states_enter_their_layers(tower: tuple[Pair, Batch, Any, Any]):
    """The states that leave those layers, which later transformers take, are far from them."""
    pair, batch, (everything, _), _ = tower
    outputs: list[torch.Tensor] = []
    vision = pair.reference.model.vision_model
    hooks = [
        vision.transformer.layers[i].register_forward_hook(
            lambda module, arguments, output: outputs.append(output[0])
        )
        for i in pair.vision_config.intermediate_layers_indices
    ]
    with torch.no_grad():
        vision(**to_torch(batch))
    for hook in hooks:
        hook.remove()
    order = np.argsort(np.argsort(pair.vision_config.intermediate_layers_indices))
    for i, place in enumerate(order):
        assert relative_difference(everything.hidden_states[i], outputs[place]) > 0.1


def test_projected_features(case: tuple[Pair, Batch]):
    pair, batch = case
    reference = pair.reference.model
    with torch.no_grad():
        features = reference.vision_model(**to_torch(batch)).last_hidden_state
        expected = reference.multi_modal_projector(features)
    ours = jax.jit(
        lambda params, batch: pair.model.apply({"params": params}, **batch, method="encode_images")
    )(pair.params, batch)
    assert_close(ours, expected.flatten(1, 3))


def test_tiles_of_aspect_ratios(case: tuple[Pair, Batch]):
    pair, batch = case
    made = tiles_of_aspect_ratios(pair.vision_config, jnp.asarray(batch["aspect_ratio_ids"]))
    np.testing.assert_array_equal(made, batch["aspect_ratio_mask"])
