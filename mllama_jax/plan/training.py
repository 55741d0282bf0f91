"""The program of a training step, with arguments that have shapes and places but no values."""

from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.plan.job import Job
from mllama_jax.plan.programs import Model, Program, array, placed_params, with_sharding
from mllama_jax.train.config import LoraConfig, OptimizerConfig
from mllama_jax.train.lora import adapter_shardings, init_adapters
from mllama_jax.train.step import TrainState, make_optimizer, placed_like, train_step

_STEPS = 1000  # of the run: they only shape the learning rate


def train_program(job: Job, model: Model) -> Program:
    """A step of full fine-tuning, or of adapters beside frozen parameters."""
    params = placed_params(model)
    lora = LoraConfig(rank=job.rank) if job.task == "lora" else None
    trained = params if lora is None else _placed_adapters(model, lora)
    config = OptimizerConfig()
    optimizer = make_optimizer(config, _STEPS)
    state = TrainState(
        step=array(model, (), jnp.int32),
        params=trained,
        opt_state=placed_like(jax.eval_shape(optimizer.init, trained), trained),
        rng=_key(model),
    )
    batch = train_batch(job, model)
    kinds = {"parameters": params, "optimizer state": state.opt_state, "inputs": batch}
    return Program(
        model,
        train_step,
        (state, batch, None if lora is None else params),
        kinds if lora is None else {**kinds, "adapters": trained},
        {"model": model, "config": config, "steps": _STEPS, "lora": lora},
        replaced=("optimizer state", "parameters" if lora is None else "adapters"),
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
    shapes = dict.fromkeys(("input_ids", "attention_mask", "labels"), words)
    if images:
        shapes |= {
            "pixel_values": ((job.batch, images, *picture), jnp.float32),
            "aspect_ratio_ids": ((job.batch, images), jnp.int32),
            "aspect_ratio_mask": ((job.batch, images, tiles), jnp.int32),
            "cross_attention_mask": ((*text, images, tiles), jnp.int32),
        }
    return {name: array(model, shape, dtype, "batch") for name, (shape, dtype) in shapes.items()}


def _placed_adapters(model: Model, lora: LoraConfig) -> Any:
    shapes = jax.eval_shape(lambda key: init_adapters(model, lora, key), jax.random.key(0))
    return jax.tree.map(with_sharding, shapes, adapter_shardings(model, lora))


def _key(model: Model) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return array(model, key.shape, key.dtype)
