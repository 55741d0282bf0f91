"""The training step: dtypes, and adapters against weights that they are merged into."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.train.config import LoraConfig, OptimizerConfig
from mllama_jax.train.lora import adapters_of, collection, init_adapters, merged
from mllama_jax.train.step import init_state, make_optimizer, train_step

MODEL = mj.MllamaForConditionalGeneration(CONFIG)
LORA = LoraConfig(rank=3, alpha=7.0, targets=("language_model/*_proj", "vision_model/*fc1"))
INPUTS = make_inputs([[(1, 3), (3, 2)], []], [8, 6])
LABELS = np.where(INPUTS["input_ids"] < 61, INPUTS["input_ids"], -100)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def adapters() -> Any:
    """Far from zero."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: init_adapters(MODEL, LORA, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) / 3, x.dtype), shapes)


def loss_of(variables: Any) -> Any:
    total, count = MODEL.apply(variables, labels=LABELS, **INPUTS, method="loss")
    return total / count


def test_adapters_equal_merged_weights(params: Any, adapters: Any):
    beside = jax.jit(loss_of)({"params": params, "lora": collection(adapters, LORA)})
    inside = jax.jit(loss_of)({"params": merged(params, adapters, LORA)})
    np.testing.assert_allclose(beside, inside, rtol=2e-6)
    assert abs(beside - jax.jit(loss_of)({"params": params})) > 0.01


def test_gradients_equal_those_of_merged_weights(params: Any, adapters: Any):
    beside = jax.jit(jax.grad(lambda a: loss_of({"params": params, "lora": collection(a, LORA)})))(
        adapters
    )
    inside = jax.jit(jax.grad(lambda a: loss_of({"params": merged(params, a, LORA)})))(adapters)
    for ours, theirs in zip(jax.tree.leaves(beside), jax.tree.leaves(inside), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max(), rtol=0)


def test_new_adapters_change_nothing(params: Any):
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, merged(params, adapters, LORA), params)
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
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, max_grad_norm=1e9)
    optimizer = make_optimizer(config, 4)
    before = jax.tree.map(np.asarray, adapters)
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, 0)
    batch = {**INPUTS, "labels": LABELS}
    state, metrics = train_step(
        state, batch, params, model=MODEL, config=config, steps=4, lora=LORA
    )
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda a: loss_of({"params": params, "lora": collection(a, LORA)}))
    )(before)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    updates, _ = optimizer.update(gradients, optimizer.init(before), before)
    expected = optax.apply_updates(before, updates)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_targets_that_match_nothing_are_refused():
    message = r"'\*/query' matches no projection; there are:\n  language_model/lm_head\n"
    with pytest.raises(ValueError, match=message):
        adapters_of(MODEL, LoraConfig(rank=2, targets=("*/query",)))


def test_bfloat16_steps_keep_float32_masters(params: Any):
    """Computed in bfloat16, the update is near that of float32, and everything kept is float32."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, max_grad_norm=1e9)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(config, 4), 0)
        batch = {**INPUTS, "labels": LABELS}
        results[dtype] = train_step(
            state, batch, model=MODEL.clone(dtype=dtype), config=config, steps=4
        )
    (exact, expected), (state, found) = results.values()
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
