"""The project's own compiled functions, with arguments that have shapes and places but no values.

What is planned is what runs: the very functions that training and generation call.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mllama_jax.configs import MllamaConfig
from mllama_jax.generation.decoding import (
    LENGTH_BUCKETS,
    DecodeState,
    Prompt,
    Rules,
    bucket,
    decode,
    encode,
    prefill,
)
from mllama_jax.generation.sampling import SamplingParams
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.plan.job import Job
from mllama_jax.quantisation import num_bytes
from mllama_jax.sharding import param_shardings, partition_spec

Model = MllamaForConditionalGeneration
Tree = Any

NEW_TOKENS = 256
"""Room for an answer in the cache that a prompt is read into."""


@dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with.

    Attributes:
        function: jitted.
        arguments, keywords: of the call, arrays as `jax.ShapeDtypeStruct` with shardings.
        kinds: what the arguments are ("parameters", "cache", …) → arrays of that kind.
        replaced: kinds that a step writes anew as a whole.
        held: parameters that a device holds beside the arguments, for the job's other programs.
    """

    model: Model
    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Tree]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    held: Tree = ()

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.keywords)


def build_program(job: Job, config: MllamaConfig, mesh: Mesh) -> Program:
    """The program of a job in which nothing is left to defaults (`mllama_jax.plan.job.resolved`).

    Raises:
        ValueError: the mesh can't split the parameters; all of these are named.
    """
    model = make_model(job, config, mesh)
    if job.trains:  # imported here: it takes what is here
        from mllama_jax.plan.training import train_program

        return train_program(job, model)
    return _PROGRAMS[job.task](job, model)


def make_model(job: Job, config: MllamaConfig, mesh: Mesh) -> Model:
    options: dict[str, Any] = {"remat": job.remat, "attention": job.attention}
    if job.trains:  # generation has its own way with pictures
        options["images_at_once"] = job.images_at_once
    return Model(
        config,
        dtype=jnp.dtype(job.dtype),
        param_dtype=jnp.dtype(job.param_dtype or job.dtype),
        mesh=mesh,
        quantise=job.quantise,
        **options,
    )


def placed_params(model: Model) -> dict[str, Any]:
    """Shapes, dtypes and places of a model's parameters."""
    assert model.mesh is not None
    # On a mesh that does not divide the model not even its shapes can be asked for.
    anywhere = model.clone(mesh=None, attention="xla")
    shardings = param_shardings(anywhere, model.mesh)
    return jax.tree.map(with_sharding, anywhere.param_shapes(), shardings)


def bytes_a_device(tree: Tree) -> int:
    """What arrays take of each device's memory, without padding."""
    return sum(
        _num_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def _num_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return num_bytes(shape, dtype)


def _vision(job: Job, model: Model) -> Program:
    params = placed_params(model)
    used = {name: params[name] for name in ("vision_model", "multi_modal_projector")}
    config = model.full_config.vision_config
    tiles = config.max_num_tiles
    picture = (tiles, config.num_channels, config.image_size, config.image_size)
    inputs = (
        array(model, (_batch(job), 1, *picture), jnp.float32, "batch"),
        array(model, (_batch(job), 1), jnp.int32, "batch"),
        array(model, (_batch(job), 1, tiles), jnp.int32, "batch"),
    )
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    kinds = {"parameters": used, "inputs": dict(zip(names, inputs, strict=True))}
    return Program(model, encode, (model, params, *inputs), kinds)


def _prefill(job: Job, model: Model) -> Program:
    params = placed_params(model)
    used, held = _decoder_alone(params)
    prompt, rules = _prompt(job, model, _length(job) + NEW_TOKENS - 1), _rules(job, model)
    kinds = {"parameters": used, "inputs": {"prompt": prompt, "rules": rules}}
    return Program(model, prefill, (model, params, prompt, rules), kinds, held=held)


def _decode(job: Job, model: Model) -> Program:
    params = placed_params(model)
    used, held = _decoder_alone(params)
    rules = _rules(job, model)
    state = _state_after_prefill(job, model, params, rules)
    stopped = array(model, (_batch(job),), bool)
    limit = array(model, (), jnp.int32)
    inputs = {"state": _without_cache(state), "rules": rules}
    kinds = {"parameters": used, "cache": state.cache, "inputs": inputs}
    return Program(model, decode, (model, params, state, rules, stopped, limit), kinds, held=held)


def _state_after_prefill(job: Job, model: Model, params: Tree, rules: Rules) -> DecodeState:
    """With a cache of ``job.length`` slots: the job's cache may be as long as that, no prompt."""
    few = min(LENGTH_BUCKETS[0], _length(job))
    prompt = _prompt(job, model, _length(job), few)
    state: DecodeState = jax.eval_shape(partial(prefill, model), params, prompt, rules)
    cache = jax.tree.map(
        lambda leaf: array(
            model, leaf.shape, leaf.dtype, *(None, "batch", "kv_heads", None, None)[: leaf.ndim]
        ),
        state.cache,
    )
    rest = jax.tree.map(lambda x: array(model, x.shape, x.dtype), _without_cache(state))
    return replace(rest, cache=cache)


def _without_cache(state: DecodeState) -> DecodeState:
    nothing: Any = ()
    return replace(state, cache=nothing)


def _prompt(job: Job, model: Model, num_slots: int, length: int | None = None) -> Prompt:
    batch, length = _batch(job), length or _length(job)
    config = model.full_config
    tiles = config.vision_config.max_num_tiles
    states = mask = None
    if job.images:
        tokens = job.images * tiles * config.vision_config.num_patches
        shape = (batch, tokens, config.text_config.hidden_size)
        states = array(model, shape, model.dtype, "batch")
        mask = array(model, (batch, length, job.images, tiles), jnp.int32)
    return Prompt(
        input_ids=array(model, (batch, length), jnp.int32),
        position_ids=array(model, (batch, length), jnp.int32),
        attention_mask=array(model, (batch, bucket(num_slots, LENGTH_BUCKETS)), jnp.int32),
        cross_attention_states=states,
        cross_attention_mask=mask,
    )


def _rules(job: Job, model: Model) -> Rules:
    batch = _batch(job)

    def make() -> Rules:
        return Rules(
            sampling=SamplingParams.same(batch),
            keys=jax.random.split(jax.random.key(0), batch),
            is_end=jnp.zeros(model.text_config.vocab_size, bool),
            min_new_tokens=jnp.zeros((), jnp.int32),
            pad_token_id=jnp.zeros((), jnp.int32),
        )

    return jax.tree.map(lambda x: array(model, x.shape, x.dtype), jax.eval_shape(make))


def _decoder_alone(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the decoder's programs take, and what lies beside it for the vision encoder's."""
    used = {"language_model": params["language_model"]}
    return used, {name: tree for name, tree in params.items() if name not in used}


def array(model: Model, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    """Without axes whole on every device; axes that are not given are not split."""
    assert model.mesh is not None
    axes += (None,) * (len(shape) - len(axes))
    sharding = NamedSharding(model.mesh, partition_spec(axes, shape, model.mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def with_sharding(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch(job: Job) -> int:
    assert job.batch is not None
    return job.batch


def _length(job: Job) -> int:
    assert job.length is not None
    return job.length


_PROGRAMS: Mapping[str, Callable[[Job, Model], Program]] = {
    "prefill": _prefill,
    "decode": _decode,
    "vision": _vision,
}
