"""The training step: dtypes, adapters, microbatches, quantised bases, steps that are skipped."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_model import CONFIG as WHOLE
from tiny_model import make_inputs, random_params

import mllama_jax as mj
from mllama_jax.loss import cross_entropy
from mllama_jax.quantisation import dequantised, is_quantised, quantised
from mllama_jax.train.components import joined, split
from mllama_jax.train.lora import (
    adapters_of,
    init_adapters,
    merged,
    num_input_axes,
    scaled,
)
from mllama_jax.train.optimizers import make_optimizer
from mllama_jax.train.settings import (
    ComponentConfig,
    LoraConfig,
    OptimizerConfig,
    Recipe,
    TrainedConfig,
)
from mllama_jax.train.step import start, train_step

# A layer of every kind: most of the time goes into compiling.
CONFIG = mj.MllamaConfig(
    WHOLE.vision_config.to_dict()
    | {"num_hidden_layers": 1, "num_global_layers": 1}
    | {"intermediate_layers_indices": [0], "vision_output_dim": 40},
    WHOLE.text_config.to_dict()
    | {"num_hidden_layers": 2, "cross_attention_layers": [1]}
    | {"num_attention_heads": 2, "num_key_value_heads": 1}
    | {"hidden_size": 32, "intermediate_size": 48},  # int4 takes groups of 16
    image_token_index=WHOLE.image_token_index,
)
MODEL = mj.MllamaForConditionalGeneration(CONFIG)
SETTINGS = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, max_grad_norm=1e9)
BY_LORA = ComponentConfig("lora")
LORA = Recipe(
    *(4, SETTINGS, TrainedConfig("lora", vision_local=BY_LORA, vision_global=BY_LORA)),
    LoraConfig(rank=3, alpha=7.0, targets=("language_model/*_proj", "vision_model/*fc1")),
)
ALL = Recipe(4, SETTINGS, TrainedConfig("all"))
INPUTS = make_inputs([[(1, 3), (3, 2)], []], [8, 6])
LABELS = np.where(INPUTS["input_ids"] < 61, INPUTS["input_ids"], -100)
BATCH = {**INPUTS, "labels": LABELS}


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def adapters() -> Any:
    """Far from zero."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: init_adapters(MODEL, LORA, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) / 3, x.dtype), shapes)


def copied(tree: Any) -> Any:
    """A step takes its state's memory over."""
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), tree)


def loss_of(params: Any) -> Any:
    total, count = MODEL.apply({"params": params}, labels=LABELS, **INPUTS, method="loss")
    return total / count


@jax.jit
@jax.value_and_grad
def of_adapters(adapters: Any, params: Any) -> Any:
    """Loss and gradients."""
    return loss_of(joined(params, scaled(adapters, LORA.lora)))


@pytest.fixture(scope="module")
def of_all(params: Any) -> Any:
    """Loss and gradients."""
    return jax.jit(jax.value_and_grad(loss_of))(params)


@pytest.fixture(scope="module")
def programs(params: Any) -> dict[str, Any]:
    """Compiled steps, by what they train."""
    found = {}
    for preset in ("all", "cross_attention"):
        recipe = replace(ALL, trained=TrainedConfig(preset))
        state, frozen = start(MODEL, params, recipe, 0)
        lowered = train_step.lower(state, BATCH, frozen, model=MODEL, recipe=recipe)
        found[preset] = lowered.compile()
    return found


def largest_difference(found: Any, expected: Any) -> float:
    """Over that array's largest magnitude, of all arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = (map(np.asarray, pair) for pair in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def gradients_of(state: Any) -> Any:
    """Of the first step, in which nothing was clipped."""
    moments = state.opt_state[1][0].mu
    return jax.tree.map(lambda mu: np.asarray(mu) / (1 - SETTINGS.b1), moments)


def test_adapters_equal_merged_weights(params: Any, adapters: Any, of_all: Any):
    loss, gradients = of_adapters(adapters, params)
    inside = jax.jit(jax.value_and_grad(lambda a: loss_of(merged(params, a, LORA.lora))))(adapters)
    np.testing.assert_allclose(loss, inside[0], rtol=2e-6)
    assert abs(loss - of_all[0]) > 0.01
    assert largest_difference(gradients, inside[1]) < 3e-5


def test_new_adapters_change_nothing(params: Any):
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    found = jax.jit(lambda p, a: merged(p, a, LORA.lora))(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    for path, adapter in adapters_of(MODEL, LORA).items():
        found = adapters
        for part in path:
            found = found[part]
        assert (found["a"].shape, found["b"].shape) == (adapter.a, adapter.b)
        assert 0.5 < np.abs(found["a"]).max() * np.sqrt(inputs_of(adapter)) <= 1


def inputs_of(adapter: Any) -> int:
    stacked = adapter.a_axes[0] == "layers"
    return int(np.prod(adapter.a[int(stacked) : -1]))


def test_a_step_moves_adapters_alone(params: Any, adapters: Any):
    state, frozen = start(MODEL, params, LORA, 0)
    assert jax.tree.structure(frozen) == jax.tree.structure(params)
    before = jax.tree.map(np.asarray, adapters)
    state, metrics = train_step(
        state.replace(params=copied(adapters)), BATCH, frozen, model=MODEL, recipe=LORA
    )
    loss, gradients = of_adapters(before, params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    optimizer = make_optimizer(MODEL, LORA)

    @jax.jit
    def updated(gradients: Any) -> Any:
        updates, _ = optimizer.update(gradients, optimizer.init(before), before)
        return optax.apply_updates(before, updates)

    expected = updated(gradients)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("preset", ["all", "cross_attention"])
def test_what_is_trained_has_the_gradients_of_the_whole(
    params: Any, of_all: Any, programs: dict[str, Any], preset: str
):
    recipe = replace(ALL, trained=TrainedConfig(preset))
    expected, _ = split(MODEL, of_all[1], recipe.trained)
    state, frozen = start(MODEL, copied(params), recipe, 0)
    before = jax.tree.map(np.asarray, frozen)
    state, metrics = programs[preset](state, BATCH, frozen)
    assert largest_difference(gradients_of(state), expected) < 1e-4
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_frozen_parameters_take_no_memory_of_the_step(params: Any, programs: dict[str, Any]):
    """Neither gradients nor moments."""
    sizes = {}
    for preset, program in programs.items():
        memory = program.memory_analysis()
        trained, _ = split(MODEL, params, TrainedConfig(preset))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
        sizes[preset] = size, memory.output_size_in_bytes, memory.temp_size_in_bytes
    whole, part = sizes["all"], sizes["cross_attention"]
    assert 3 * part[0] < part[1] < 3.1 * part[0] + 1000
    assert whole[1] > 3 * whole[0]
    assert part[2] < whole[2] - 0.5 * (whole[0] - part[0])


def test_adapters_beside_integers_have_the_gradients_of_what_these_stand_for(
    params: Any, adapters: Any
):
    integers, floats = stored_as(params, "int8")
    model = MODEL.clone(quantise="int8")
    loss, expected = of_adapters(adapters, floats)
    state, frozen = start(model, integers, LORA, 0)
    state = state.replace(params=copied(adapters))
    state, metrics = train_step(state, BATCH, frozen, model=model, recipe=LORA)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    assert largest_difference(gradients_of(state), expected) < 1e-4
    with pytest.raises(ValueError, match="stores cross_attention in few bits"):
        start(model, integers, replace(ALL, trained=TrainedConfig()), 0)


def stored_as(params: Any, kind: Any) -> tuple[Any, Any]:
    """The decoder's kernels as integers with scales, and as the weights these stand for."""
    integers, floats = flatten_dict(params), flatten_dict(params)
    for path, leaf in flatten_dict(params).items():
        if is_quantised(path):
            inputs = num_input_axes(path[:-1])
            layers = [quantised(layer, kind, inputs) for layer in np.asarray(leaf)]
            kernels, scales = zip(*layers, strict=True)
            integers[path] = jnp.stack(kernels)
            integers[*path[:-1], "scale"] = jnp.stack(scales)
            weights = [dequantised(*pair, inputs) for pair in zip(kernels, scales, strict=True)]
            floats[path] = jnp.stack(weights)
    return unflatten_dict(integers), unflatten_dict(floats)


def test_microbatches_equal_the_whole_batch(params: Any, of_all: Any):
    """Though they have different numbers of labels and of pictures."""
    recipe = replace(ALL, optimizer=replace(SETTINGS, microbatches=2))
    state, frozen = start(MODEL, copied(params), recipe, 0)
    state, metrics = train_step(state, BATCH, frozen, model=MODEL, recipe=recipe)
    labels = (LABELS[:, 1:] != -100).sum(axis=1)
    assert metrics["labels"] == labels.sum()
    assert labels[0] != labels[1]
    loss, expected = of_all
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)
    assert largest_difference(gradients_of(state), expected) < 1e-4


def test_z_loss_adds_the_square_of_the_softmaxs_denominator():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)) * 3)
    labels = jnp.array([[1, -100, 6], [-100, 0, 2]])
    total, count = cross_entropy(logits, labels)
    found, same_count = cross_entropy(logits, labels, 0.1)
    log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    np.testing.assert_allclose(found - total, 0.1 * (log_z[labels != -100] ** 2).sum(), rtol=1e-5)
    assert same_count == count == 4


def test_batches_that_microbatches_do_not_divide_are_refused(params: Any):
    recipe = replace(ALL, optimizer=replace(SETTINGS, microbatches=3))
    state, frozen = start(MODEL, params, recipe, 0)
    with pytest.raises(ValueError, match=r"batch of 2 .*microbatches=3 .*multiple of 3"):
        train_step(state, BATCH, frozen, model=MODEL, recipe=recipe)


def test_steps_that_are_not_finite_change_nothing(params: Any, programs: dict[str, Any]):
    step = programs["all"]
    infinite = {**BATCH, "pixel_values": np.full_like(INPUTS["pixel_values"], np.inf)}
    unlabelled = {**BATCH, "labels": np.full_like(LABELS, -100)}
    state, frozen = start(MODEL, copied(params), ALL, 0)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    for number, batch in enumerate((infinite, unlabelled), start=1):
        state, metrics = step(state, batch, frozen)
        assert metrics["skipped"] == 1
        assert np.isfinite(metrics["loss"]) == (number == 2)
        assert (state.step, state.skipped) == (number, number)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert metrics["labels"] == metrics["loss"] == metrics["grad_norm"] == 0
    state, metrics = step(state, BATCH, frozen)
    assert (metrics["skipped"], state.skipped, state.step) == (0, 2, 3)
    assert metrics["learning_rate"] == pytest.approx(SETTINGS.learning_rate)
    expected, _ = step(start(MODEL, copied(params), ALL, 0)[0], BATCH, frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_targets_that_match_nothing_are_refused():
    recipe = replace(LORA, lora=LoraConfig(rank=2, targets=("*/query",)))
    message = r"'\*/query' matches no projection of cross_.*there are:\n  language_model/model/la"
    with pytest.raises(ValueError, match=message):
        adapters_of(MODEL, recipe)


def test_bfloat16_steps_keep_float32_masters(params: Any, programs: dict[str, Any]):
    """Computed in bfloat16, the update is near that of float32, and everything kept is float32."""
    state, frozen = start(MODEL, copied(params), ALL, 0)
    exact, expected = programs["all"](state, BATCH, frozen)
    state, frozen = start(MODEL, copied(params), ALL, 0)
    model = MODEL.clone(dtype=jnp.bfloat16)
    state, found = train_step(state, BATCH, frozen, model=model, recipe=ALL)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0.02)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=0.05)
    moments = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    near = [
        np.sum(ours * theirs) / np.sqrt(np.sum(ours**2) * np.sum(theirs**2))
        for ours, theirs in zip(
            jax.tree.leaves(state.opt_state[1][0].mu),
            jax.tree.leaves(exact.opt_state[1][0].mu),
            strict=True,
        )
    ]
    assert min(near) > 0.9
    assert np.median(near) > 0.999
