"""The program of a training step, with arguments that have shapes and places but no values."""

from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.plan.job import Job
from mllama_jax.plan.programs import Model, Program, array, placed_params, with_sharding
from mllama_jax.plan.recipes import is_packed, recipe_of
from mllama_jax.sharding import device_kind
from mllama_jax.train.components import joined, split
from mllama_jax.train.lora import adapter_shardings, init_adapters
from mllama_jax.train.settings import Recipe
from mllama_jax.train.step import TrainState, make_optimizer, placed_like, train_step_on


def train_program(job: Job, model: Model) -> Program:
    """A step of training, whatever of the model is trained."""
    recipe = recipe_of(job)
    whole, frozen = split(model, placed_params(model), recipe.trained)
    adapters = _placed_adapters(model, recipe)
    trained = joined(whole, adapters)
    optimizer = make_optimizer(model, recipe)
    state = TrainState(
        step=array(model, (), jnp.int32),
        params=trained,
        opt_state=placed_like(jax.eval_shape(optimizer.init, trained), trained),
        rng=_key(model),
        skipped=array(model, (), jnp.int32),
    )
    batch = train_batch(job, model)
    kinds = {
        "parameters": whole,
        "frozen parameters": frozen,
        "adapters": adapters,
        "optimizer state": state.opt_state,
        "inputs": batch,
    }
    return Program(
        model,
        train_step_on(device_kind(model.mesh)),
        (state, batch, frozen),
        {kind: tree for kind, tree in kinds.items() if jax.tree.leaves(tree)},
        {"model": model, "recipe": recipe},
        replaced=("parameters", "adapters", "optimizer state"),
    )


def train_batch(job: Job, model: Model) -> dict[str, Any]:
    """What the data pipeline makes of conversations, split over the samples."""
    assert job.batch is not None
    assert job.length is not None
    config = model.full_config.vision_config
    tiles, images = config.max_num_tiles, job.images
    picture = (tiles, config.num_channels, config.image_size, config.image_size)
    text = (job.batch, job.length)
    words: tuple[tuple[int, ...], Any] = (text, jnp.int32)
    rows = "segment_ids" if is_packed(job) else "attention_mask"
    shapes = dict.fromkeys(("input_ids", rows, "labels"), words)
    if images:
        shapes |= {
            "pixel_values": ((job.batch, images, *picture), jnp.float32),
            "aspect_ratio_ids": ((job.batch, images), jnp.int32),
            "aspect_ratio_mask": ((job.batch, images, tiles), jnp.int32),
            "cross_attention_mask": ((*text, images, tiles), jnp.int32),
        }
    return {name: array(model, shape, dtype, "batch") for name, (shape, dtype) in shapes.items()}


def _placed_adapters(model: Model, recipe: Recipe) -> Any:
    shapes = jax.eval_shape(lambda key: init_adapters(model, recipe, key), jax.random.key(0))
    return jax.tree.map(with_sharding, shapes, adapter_shardings(model, recipe))


def _key(model: Model) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return array(model, key.shape, key.dtype)
