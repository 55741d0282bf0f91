"""Missing tiles that are computed once, against transformers, which computes all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from closeness import assert_close
from hf_reference import APERIODIC, Pair, make_pair

from mllama_jax.tiles import computed_tiles, missing_tiles_are_alike, tiles_of_aspect_ratios

KINDS = ("reference", "xla", "splash_interpret")
TABLES = (
    ("gated_positional_embedding", "tile_embedding"),
    ("pre_tile_positional_embedding", "embedding"),
    ("post_tile_positional_embedding", "embedding"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tables whose rows of missing tiles are alike, though not zero."""
    pair = make_pair(APERIODIC, 3, tmp_path_factory.mktemp("alike"))
    config = pair.vision_config
    vision = dict(pair.params["vision_model"])
    for module, name in TABLES:
        table = np.array(vision[module][name])
        for ratio in range(len(table)):
            count = number_of_tiles(config, ratio)
            table[ratio, count:] = table[ratio, min(count, config.max_num_tiles - 1)]
        vision[module] = {**vision[module], name: jnp.asarray(table)}
        theirs = getattr(pair.reference.model.vision_model, module)
        weight = getattr(theirs, name).weight
        weight.data = torch.from_numpy(table.reshape(weight.shape))
    pair.params["vision_model"] = vision
    return pair


def number_of_tiles(config: Any, ratio: int) -> int:
    return int(tiles_of_aspect_ratios(config, jnp.asarray([[ratio]])).sum())


def pictures(config: Any, ratios: list[int]) -> dict[str, np.ndarray]:
    """A picture a sample."""
    random = np.random.default_rng(4)
    ids = np.array([[ratio] for ratio in ratios], np.int32)
    exists = np.array(tiles_of_aspect_ratios(config, jnp.asarray(ids)))
    tile = (config.num_channels, config.image_size, config.image_size)
    pixels = random.normal(size=(*exists.shape, *tile)).astype(np.float32)
    pixels *= exists[..., None, None, None]
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": exists}


# Ids of one, two and three tiles; the last batch has a picture with two missing tiles among its
# three, of which the last stands for another one.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratios", [[1, 1], [2, 5], [3], [4, 1], [2, 1]])
def test_features_are_those_of_all_tiles(pair: Pair, ratios: list[int], kind: str):
    config = pair.vision_config
    batch = pictures(config, ratios)
    most = max(number_of_tiles(config, ratio) for ratio in ratios)
    num_tiles = computed_tiles(most, config.max_num_tiles)
    with torch.no_grad():
        images = {name: torch.from_numpy(x).long() for name, x in batch.items()}
        images["pixel_values"] = torch.from_numpy(batch["pixel_values"])
        reference = pair.reference.model
        features = reference.vision_model(**images).last_hidden_state
        expected = reference.multi_modal_projector(features).flatten(1, 3)
    model = pair.model.clone(attention=kind)
    encode = jax.jit(
        lambda params, batch: model.apply(
            {"params": params}, **batch, num_tiles=num_tiles, method="encode_images"
        )
    )
    assert_close(encode(pair.params, batch), expected)


def test_fewer_tiles_take_less_computation(pair: Pair):
    batch = pictures(pair.vision_config, [1])

    def flops(num_tiles: int | None) -> float:
        def encode(params: Any) -> jax.Array:
            return pair.model.apply(
                {"params": params}, **batch, num_tiles=num_tiles, method="encode_images"
            )

        return jax.jit(encode).lower(pair.params).cost_analysis()["flops"]

    assert flops(2) < 0.6 * flops(None)


@pytest.mark.parametrize(("module", "name"), TABLES)
def test_one_embedding_that_tells_missing_tiles_apart(pair: Pair, module: str, name: str):
    config, vision = pair.vision_config, pair.params["vision_model"]
    assert missing_tiles_are_alike(config, vision)
    table = np.array(vision[module][name])
    # The last missing tile of a picture of 1 x 2 tiles, one number of it.
    table[2, 3].flat[5] = np.nextafter(table[2, 3].flat[5], np.inf)
    changed = {**vision[module], name: jnp.asarray(table)}
    assert not missing_tiles_are_alike(config, {**vision, module: changed})
    closed = {**changed, "gate": jnp.zeros_like(changed["gate"])}
    assert missing_tiles_are_alike(config, {**vision, module: closed})
    # Of a real tile it says nothing.
    table = np.array(vision[module][name])
    table[2, 1] += 1
    assert missing_tiles_are_alike(
        config, {**vision, module: {**vision[module], name: jnp.asarray(table)}}
    )


def test_no_states_of_tiles_that_are_not_computed(pair: Pair):
    batch = pictures(pair.vision_config, [1])
    with pytest.raises(ValueError, match="num_tiles=2"):
        pair.model.apply(
            {"params": pair.params},
            **batch,
            num_tiles=2,
            output_hidden_states=True,
            method=lambda model, *args, **kwargs: model.vision_model(*args, **kwargs),
        )
