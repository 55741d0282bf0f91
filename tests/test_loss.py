"""The loss in chunks and pictures in turns: the same numbers in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.loss import cross_entropy, loss_in_chunks

MODEL = mj.MllamaForConditionalGeneration(CONFIG)
INPUTS = make_inputs([[(1, 3), (3, 2)], [], [(0, 1)]], [11, 7, 9])
LABELS = np.where(INPUTS["input_ids"] < 61, INPUTS["input_ids"], -100)
LABELS[1, :5] = -100


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def value_and_gradients(model: Any, params: Any, **arguments: Any) -> Any:
    def loss(params: Any) -> Any:
        total, count = model.apply(
            {"params": params}, labels=LABELS, **INPUTS, **arguments, method="loss"
        )
        return total / count, count

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def expected(params: Any) -> Any:
    def loss(params: Any) -> Any:
        return MODEL.apply({"params": params}, **INPUTS, labels=LABELS).loss

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(found: Any, expected: Any) -> None:
    (loss, count), gradients = found
    assert count == (LABELS[:, 1:] != -100).sum()
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * largest + 1e-9, rtol=0)


@pytest.mark.parametrize("tokens", [15, 1000])
def test_loss_in_chunks(params: Any, expected: Any, tokens: int):
    """Of 5 (11 is no multiple of it) and all tokens of three rows."""
    assert_same(value_and_gradients(MODEL, params, tokens_at_once=tokens), expected)


def test_logits_never_exist_at_once(params: Any):
    """Neither forward nor backward is there an array as large as all logits."""

    def sizes(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield getattr(variable.aval, "shape", ())
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    def loss(params: Any, tokens: int) -> Any:
        arguments = {"labels": LABELS, **INPUTS, "tokens_at_once": tokens, "method": "loss"}
        return MODEL.apply({"params": params}, **arguments)[0]

    def has_logits(tokens: int) -> bool:
        traced = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, tokens)
        logits = 3 * 11 * CONFIG.text_config.vocab_size
        vocabulary = CONFIG.text_config.vocab_size
        return any(
            shape and shape[-1] == vocabulary and np.prod(shape) >= logits
            for shape in sizes(traced.jaxpr)
        )

    assert has_logits(1000)
    assert not has_logits(6)


@pytest.mark.parametrize(("images_at_once", "remat"), [(1, "full"), (4, "none")])
def test_pictures_in_turns(params: Any, expected: Any, images_at_once: int, remat: str):
    """Six picture slots, in six turns or in two."""
    model = MODEL.clone(images_at_once=images_at_once, remat=remat)
    assert_same(value_and_gradients(model, params), expected)


def head_loss(params: Any, x: Any, labels: Any) -> Any:
    return cross_entropy(x @ params["head"] * params["scale"], labels)[0]


def head_params(rng: np.random.Generator) -> Any:
    return {"head": rng.integers(-8, 8, (8, 13)).astype(np.int8), "scale": np.ones(13, np.float32)}


@pytest.mark.parametrize("shards", [1, 3])
def test_tokens_without_a_label_cost_nothing(shards: int):
    """Their states are not even looked at, where they fill chunks of their own."""
    rng = np.random.default_rng(3)
    params = head_params(rng)
    x = rng.standard_normal((shards, 12, 8), np.float32)
    labels = np.full((shards, 12), -100, np.int32)
    for shard in range(shards):
        labels[shard, rng.permutation(12)[: 4 - shard]] = rng.integers(0, 13, 4 - shard)

    def of(loss: Any) -> Any:
        """Whole numbers have no gradient."""
        return jax.jit(
            jax.value_and_grad(lambda scale, x: loss({**params, "scale": scale}, x), (0, 1))
        )

    def chunks(params: Any, x: Any) -> Any:
        return loss_in_chunks(head_loss, params, x, jnp.asarray(labels), 2)

    def whole(params: Any, x: Any) -> Any:
        return head_loss(params, x, jnp.asarray(labels))

    found = of(chunks)(params["scale"], x)
    assert_close(found, of(whole)(params["scale"], x))
    if shards == 1:
        unseen = np.where((labels == -100)[..., None], np.nan, x)
        jax.tree.map(np.testing.assert_array_equal, of(chunks)(params["scale"], unseen), found)
        np.testing.assert_array_equal(jax.jit(chunks)(params, unseen), found[0])


def test_no_labels_at_all():
    x, labels = np.full((1, 4, 8), np.nan, np.float32), np.full((1, 4), -100, np.int32)
    params = head_params(np.random.default_rng(0))
    found = jax.value_and_grad(lambda x: loss_in_chunks(head_loss, params, x, labels, 3))(x)
    assert not any(np.any(leaf) for leaf in found)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max()),
        *(found, expected),
    )
