"""The largest arrays that a program makes on the way, by their formulas.

They name what fills the memory where the compiler refuses a program: it then says no more than how
much there is too much.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp

from mllama_jax.configs import MllamaConfig
from mllama_jax.flops import encoded_length, image_length
from mllama_jax.plan.job import Job
from mllama_jax.plan.memory import type_text
from mllama_jax.plan.programs import Program, bytes_a_device
from mllama_jax.plan.record import Buffer
from mllama_jax.sharding import num_parts

_QUERIES_AT_ONCE = {"reference": math.inf, "xla": 512}
"""Rows of scores that exist at a time, for the kinds of attention that make any."""


def estimated_temporaries(job: Job, config: MllamaConfig, program: Program) -> list[Buffer]:
    """Of each device, the largest first."""
    mesh = program.model.mesh
    samples = (job.batch or 1) // num_parts("batch", job.batch or 1, mesh)
    tensor = 1 if mesh is None else mesh.shape.get("tensor", 1)
    pictures = samples * job.images
    found: list[Buffer] = []
    if job.task == "train":
        size = bytes_a_device(program.kinds["parameters"])  # those that are trained
        found.append(Buffer("gradients", "as the parameters", size, "estimate"))
    if job.task != "vision":
        found += _decoder(job, config, samples, tensor)
    if job.task in ("train", "lora", "vision"):
        at_once = min(pictures, job.images_at_once or pictures)
        found += _vision(job, config, pictures, at_once, tensor)
    return sorted(found, key=lambda buffer: -buffer.bytes)


def _decoder(job: Job, config: MllamaConfig, samples: int, tensor: int) -> Iterator[Buffer]:
    text = config.text_config
    length = 1 if job.task == "decode" else job.length or 1
    if job.trains:
        width, kept = text.hidden_size, "inputs of the decoder's layers"
        if job.remat == "none":
            width += (3 * text.hidden_size + 3 * text.intermediate_size) // tensor
            kept = "activations of the decoder's layers"
        shape = (text.num_hidden_layers, samples, length, width)
        yield _buffer(f"{kept}, kept for the backward pass", job.dtype, *shape)
    if job.task == "prefill":
        layers = text.num_hidden_layers - len(text.cross_attention_layers)
        heads = max(1, text.num_key_value_heads // tensor)
        cache = (layers, 2, samples, heads, length, text.head_dim)
        yield _buffer("keys and values of the prompts", job.dtype, *cache)
    keys = max(job.length or 1, job.images * image_length(config))
    heads = -(-text.num_attention_heads // tensor)
    yield from _scores("decoder", job, samples, heads, length, keys)
    if job.images and job.task != "decode":
        tokens = job.images * image_length(config)
        yield _buffer("image features", job.dtype, samples, tokens, text.hidden_size)


def _vision(
    job: Job, config: MllamaConfig, pictures: int, at_once: int, tensor: int
) -> Iterator[Buffer]:
    if not pictures:
        return
    vision = config.vision_config
    length = encoded_length(config)
    states = len(vision.intermediate_layers_indices) + 1
    yield _buffer(
        "states of the vision encoder", job.dtype, at_once, length, states * vision.hidden_size
    )
    if job.task == "train":
        layers = vision.num_hidden_layers + vision.num_global_layers
        width, kept = vision.hidden_size, "inputs of the vision encoder's layers"
        if job.remat == "none":
            width += (4 * vision.hidden_size + 2 * vision.intermediate_size) // tensor
            kept = "activations of the vision encoder's layers"
        name = f"{kept}, kept for the backward pass"
        yield _buffer(name, job.dtype, layers, at_once, length, width)
    heads = -(-vision.num_attention_heads // tensor)
    yield from _scores("vision encoder", job, at_once, heads, length, length)


def _scores(
    where: str, job: Job, samples: int, heads: int, queries: int, keys: int
) -> Iterator[Buffer]:
    if job.attention in _QUERIES_AT_ONCE:
        rows = min(queries, _QUERIES_AT_ONCE[job.attention])
        name = f"attention scores of a layer of the {where}"
        yield _buffer(name, "float32", samples, heads, int(rows), keys)


def _buffer(name: str, dtype: str, *shape: int) -> Buffer:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    return Buffer(name, type_text(dtype, shape), size, "estimate")
