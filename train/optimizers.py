"""Optimizers out of optax's parts, with learning rates and decays of their own for components."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.train.components import Path, component_of
from mllama_jax.train.lora import num_input_axes
from mllama_jax.train.settings import OptimizerConfig, Recipe

# An orthogonal matrix times this and the root of its longer side has entries as large as AdamW's
# updates. Source: Liu et al. 2025, Muon is scalable for LLM training, section 2.2.
_MUON_SIZE = 0.2
# Source: Shazeer and Stern 2018, Adafactor, section 6.
_ADAFACTOR_CLIP = 1.0


def learning_rates(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then what the schedule's name says."""
    peak, lowest = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=lowest,
        )
    falling = {
        "constant": 0,
        "linear": steps - warmup,
        "wsd": min(max(round(config.decay_fraction * steps), 1), steps - warmup),
    }[config.schedule]
    parts = [(0, optax.linear_schedule(0.0, peak, warmup))] if warmup else []
    if falling < steps - warmup:
        parts.append((warmup, optax.constant_schedule(peak)))
    if falling:
        parts.append((steps - falling, optax.linear_schedule(peak, lowest, falling)))
    starts, schedules = zip(*parts, strict=True)
    return optax.join_schedules(schedules, starts[1:])


def is_decayed(path: Path) -> bool:
    """Whether a parameter is under weight decay: kernels and adapters are.

    Norms, biases, gates and embeddings (token, class, position and tile) are left alone.
    """
    return path[-1] in ("kernel", "a", "b")


def make_optimizer(model: PretrainedModule, recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer of a recipe, behind a clip of the global gradient norm."""
    config, components = recipe.optimizer, recipe.trained.components

    def in_groups(updates: Any, params: Any) -> Any:
        """Decay, and the component's learning rate over the optimizer's."""

        def one(key_path: Any, update: Any, param: Any) -> Any:
            path = _names(key_path)
            component = components[component_of(model, path)]
            decay = component.weight_decay
            decay = config.weight_decay if decay is None else decay
            update = update + decay * param if is_decayed(path) and decay else update
            rate = component.learning_rate
            return update if rate is None else update * (rate / config.learning_rate)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.chain(
            _with_exact_moments(_scaling(model, config)),
            optax.stateless(in_groups),
            optax.scale_by_learning_rate(learning_rates(config, recipe.steps)),
        ),
    )


def _with_exact_moments(scaling: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moments in float32 (the first, unless it is told otherwise), whatever parameters are.

    The second one would stand still in bfloat16: near its value it moves by less than is told
    apart there.
    """

    def init(params: Params) -> Any:
        return scaling.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformationExtraArgs(init, scaling.update)  # type: ignore[arg-type]


def _scaling(model: PretrainedModule, config: OptimizerConfig) -> optax.GradientTransformation:
    dtype = None if config.moment_dtype is None else jnp.dtype(config.moment_dtype)
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(_ADAFACTOR_CLIP))
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    if config.name == "adamw":
        return adam
    muon = optax.chain(
        scale_by_muon(mu_dtype=dtype, weight_dimension_numbers=_matrices),
        optax.stateless(_as_large_as_adam),
    )

    def label(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if _is_hidden(model, _names(path)) else "adam", params
        )

    return optax.partition({"muon": muon, "adam": adam}, label)


def _is_hidden(model: PretrainedModule, path: Path) -> bool:
    """A map between hidden states: neither picture patches, nor logits, nor an adapter's half."""
    return path[-1] == "kernel" and "layers" in path


def _matrices(params: Params) -> Any:
    """Which axes of a stack of layers' kernels are inputs and outputs."""

    def one(key_path: Any, leaf: Any) -> MuonDimensionNumbers:
        inputs = num_input_axes(_names(key_path)[:-1])
        return MuonDimensionNumbers(
            tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(one, params)


def _as_large_as_adam(updates: Any, params: Any) -> Any:
    def one(key_path: Any, update: Any) -> Any:
        inputs = 1 + num_input_axes(_names(key_path)[:-1])
        sides = math.prod(update.shape[1:inputs]), math.prod(update.shape[inputs:])
        return update * (_MUON_SIZE * math.sqrt(max(sides)))

    return jax.tree_util.tree_map_with_path(one, updates)


def _names(key_path: Any) -> Path:
    return tuple(key.key for key in key_path)
