"""Texts packed into one row give what each gives alone: logits, loss and all gradients."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_texts import ROWS, TEXTS, alone, packed, places
from processes import results, start
from tiny_model import CONFIG, random_params

import mllama_jax as mj
from mllama_jax.decoder_inputs import segment_positions

MODEL = mj.MllamaForConditionalGeneration(CONFIG, attention="reference")
PACKED = packed()


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@partial(jax.jit, static_argnames="model")
def learn(params: Any, inputs: Any, model: Any = MODEL) -> Any:
    """(mean of the losses, logits), gradients of the mean."""

    def loss(params: Any) -> Any:
        output = model.apply({"params": params}, **inputs)
        return output.loss, output.logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def plain_logits(params: Any, inputs: Any) -> Any:
    inputs = {name: x for name, x in inputs.items() if name != "labels"}
    return MODEL.apply({"params": params}, **inputs).logits


logits = jax.jit(plain_logits)


@pytest.fixture(scope="module")
def expected(params: Any) -> Any:
    """Of the texts, each alone: the sum and number of losses, all logits, gradients of the sum."""
    texts = [alone(number) for number in range(len(TEXTS))]
    counts = [int((text["labels"][:, 1:] != -100).sum()) for text in texts]
    found = [learn(params, text) for text in texts]
    total = sum(loss * count for ((loss, _), _), count in zip(found, counts, strict=True))
    gradients = jax.tree.map(
        lambda *means: sum(mean * count for mean, count in zip(means, counts, strict=True)),
        *[gradients for _, gradients in found],
    )
    return total, sum(counts), [logits[0] for (_, logits), _ in found], gradients


@pytest.mark.parametrize("kind", ["reference", "xla", "splash_interpret"])
def test_packed_texts_give_what_each_gives_alone(params: Any, expected: Any, kind: Any):
    total, count, all_logits, sums = expected
    (mean, logits), gradients = learn(params, PACKED, MODEL.clone(attention=kind))
    np.testing.assert_allclose(mean * count, total, rtol=1e-6)
    for row, _, tokens, _, number in places():
        np.testing.assert_allclose(
            logits[row, tokens], all_logits[number], atol=2e-5, rtol=1e-5, err_msg=str(number)
        )
    paths = jax.tree_util.tree_leaves_with_path(sums)
    for (path, theirs), ours in zip(paths, jax.tree.leaves(gradients), strict=True):
        largest = np.abs(theirs).max()
        assert largest > 0, path
        np.testing.assert_allclose(
            ours * count, theirs, atol=3e-5 * largest, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


def test_the_loss_in_chunks_is_that_of_the_labels_within_texts(params: Any, expected: Any):
    @jax.jit
    def loss(params: Any) -> Any:
        return MODEL.apply({"params": params}, **PACKED, tokens_at_once=50, method="loss")

    total, count = loss(params)
    assert count == expected[1]
    np.testing.assert_allclose(total, expected[0], rtol=1e-6)


def test_no_text_is_touched_by_another(params: Any):
    """Neither by its words nor by its pictures: the logits' gradient is exactly zero there."""
    row, _, tokens, pictures, _ = places()[2]  # behind a text with two pictures and one without
    embedding = params["language_model"]["model"]["embed_tokens"]["embedding"]
    inputs = {name: x for name, x in PACKED.items() if name not in ("labels", "input_ids")}

    def size(given: Any) -> Any:
        changed = {**inputs, "pixel_values": given[0], "inputs_embeds": given[1]}
        return (plain_logits(params, changed)[row, tokens] ** 2).sum()

    pixels, embeds = jax.jit(jax.grad(size))(
        (PACKED["pixel_values"], embedding[PACKED["input_ids"]])
    )
    for gradient, own in ((pixels, pictures), (embeds, tokens)):
        assert np.abs(gradient[row, own]).max() > 0
        gradient = np.array(gradient)
        gradient[row, own] = 0
        assert not gradient.any()


def test_positions_start_anew_with_each_text():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 5, 5, 0, 2, 2, 2, 2]])
    found = np.asarray(segment_positions(segments))
    is_text = np.asarray(segments) != 0
    np.testing.assert_array_equal(found[0][is_text[0]], [0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(found[1][is_text[1]], [0, 1, 0, 1, 2, 3])


def test_given_positions_are_taken(params: Any):
    own = segment_positions(PACKED["segment_ids"])
    found, restarted, spread = (
        logits(params, {**PACKED, "position_ids": positions}) for positions in (None, own, 2 * own)
    )
    np.testing.assert_allclose(restarted, found, atol=1e-5)
    assert np.abs(spread - found).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_mask": np.ones((len(ROWS), 128), np.int32)}, "attention_mask"),
        ({"past_key_values": MODEL.init_cache(len(ROWS), 256, 0)}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"cross_attention_mask": None}, "cross_attention_mask"),
        ({"segment_ids": np.ones((len(ROWS), 5), np.int32)}, r"\(2, 5\), expected \(2, 128\)"),
    ],
)
def test_what_has_no_meaning_for_packed_texts_is_refused(params: Any, changes: Any, named: str):
    with pytest.raises(ValueError, match=f"segment_ids.*{named}"):
        jax.eval_shape(lambda: MODEL.apply({"params": params}, **{**PACKED, **changes}))


def test_tokens_that_see_no_image_must_not_see_those_of_other_texts(params: Any):
    model = MODEL.clone(hf_masked_rows=True)
    with pytest.raises(ValueError, match="segment_ids needs hf_masked_rows=False"):
        jax.eval_shape(lambda: model.apply({"params": params}, **PACKED))


def test_eight_devices_give_twice_as_much_for_the_same_rows_twice(expected: Any, tmp_path: Path):
    total, count, _, sums = expected
    file = tmp_path / "gradients.npz"
    (result,) = results([start("packing_processes.py", 8, file)])
    assert result.found == [pytest.approx(2 * float(total), rel=1e-6), 2 * count]
    with np.load(file) as gradients:
        for ours, theirs in zip(gradients.values(), jax.tree.leaves(sums), strict=True):
            largest = 2 * np.abs(theirs).max()
            np.testing.assert_allclose(ours, 2 * theirs, atol=3e-5 * largest, rtol=0)
