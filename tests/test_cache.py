"""The cache: its layout, what it refuses, and decoding with it equals the full forward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, NUM_PATCHES, NUM_TILES, make_inputs, random_params

import mllama_jax as mj

TEXT = CONFIG.text_config
MODEL = mj.MllamaForConditionalGeneration(CONFIG)
NUM_IMAGE_TOKENS = 2 * NUM_TILES * NUM_PATCHES
T = 8
LayerCache = tuple[Any, ...]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, seed=1)


@jax.jit
def run(params: Any, inputs: dict[str, Any]) -> Any:
    output = MODEL.apply({"params": params}, **inputs, use_cache=True)
    return output.logits, output.past_key_values


@pytest.fixture(scope="module", params=["left", "right"])
def case(request: pytest.FixtureRequest, params: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A batch with two images and none, and its logits without a given cache."""
    inputs = make_inputs([[(1, 3), (4, 2)], []], [8, 5], request.param)
    return inputs, np.asarray(run(params, inputs)[0])


def assert_same(ours: Any, expected: Any, real: Any = slice(None)) -> None:
    ours, expected = np.asarray(ours)[real], np.asarray(expected)[real]
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def part(inputs: dict[str, np.ndarray], tokens: slice, *, images: bool) -> dict[str, np.ndarray]:
    """The inputs of some tokens; the mask covers the slots up to them."""
    chosen = {
        "input_ids": inputs["input_ids"][:, tokens],
        "cross_attention_mask": inputs["cross_attention_mask"][:, tokens],
        "attention_mask": inputs["attention_mask"],
    }
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return chosen | ({name: inputs[name] for name in names} if images else {})


def test_chunks_and_steps_equal_the_full_pass(
    params: Any, case: tuple[dict[str, np.ndarray], np.ndarray]
):
    """A prompt in two chunks, then token by token, in a cache with slots to spare."""
    inputs, expected = case
    real = inputs["attention_mask"].astype(bool)
    cache = MODEL.init_cache(2, T + 3, NUM_IMAGE_TOKENS)
    pieces = [slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 8)]
    for piece in pieces:
        arguments = part(inputs, piece, images=piece.start == 0)
        logits, cache = run(params, arguments | {"past_key_values": cache})
        assert int(cache.length) == piece.stop
        assert_same(logits, expected[:, piece], real[:, piece])
    # Slots beyond the mask count as tokens.
    step = part(inputs, slice(7, 8), images=False) | {"past_key_values": cache}
    whole = np.pad(inputs["attention_mask"], ((0, 0), (0, 3)), constant_values=1)
    assert_same(run(params, step)[0], run(params, step | {"attention_mask": whole})[0])
    assert cache.max_length == T + 3
    assert cache.num_image_tokens == NUM_IMAGE_TOKENS


def test_steps_at_explicit_positions(params: Any, case: tuple[dict[str, np.ndarray], np.ndarray]):
    """A step may be repeated: ``cache_position`` says where the tokens stand."""
    inputs, expected = case
    real = inputs["attention_mask"].astype(bool)
    cache = MODEL.init_cache(2, T, NUM_IMAGE_TOKENS)
    _, cache = run(params, part(inputs, slice(0, 3), images=True) | {"past_key_values": cache})
    wrong = part(inputs, slice(3, 6), images=False)
    _, cache = run(
        params, wrong | {"input_ids": wrong["input_ids"] * 0 + 5, "past_key_values": cache}
    )
    arguments = part(inputs, slice(3, 6), images=False) | {
        "cross_attention_mask": inputs["cross_attention_mask"],  # the whole text's
        "cache_position": jnp.arange(3, 6),
        "past_key_values": cache,
    }
    logits, cache = run(params, arguments)
    assert int(cache.length) == 6
    assert_same(logits, expected[:, 3:6], real[:, 3:6])


def test_legacy_cache(params: Any, case: tuple[dict[str, np.ndarray], np.ndarray]):
    """Hugging Face's tuples go in and out, and grow."""
    inputs, expected = case
    real = inputs["attention_mask"].astype(bool)
    _, cache = run(params, part(inputs, slice(0, 6), images=True) | {"attention_mask": real[:, :6]})
    assert cache.max_length == 6
    layers = cache.to_legacy_cache(TEXT)
    assert [pair[0].shape for pair in layers] == [
        (2, 2, NUM_IMAGE_TOKENS if TEXT.is_cross_attention_layer(i) else 6, 6) for i in range(6)
    ]
    arguments = part(inputs, slice(6, 8), images=False) | {"past_key_values": layers}
    logits, layers = run(params, arguments)
    assert isinstance(layers, tuple)
    assert layers[0][0].shape == (2, 2, 8, 6)
    assert_same(logits, expected[:, 6:], real[:, 6:])


def test_text_only_cache(params: Any):
    """Without pictures there is nothing to attend to, in the cache either."""
    inputs = make_inputs([[], []], [6, 6])
    expected, returned = run(params, inputs)
    assert returned.cross_keys is None
    assert returned.max_length == 6
    layers = returned.to_legacy_cache(TEXT)
    assert [pair is None for pair in layers] == [TEXT.is_cross_attention_layer(i) for i in range(6)]
    cache = MODEL.init_cache(2, 6)
    for piece in (slice(0, 5), slice(5, 6)):
        arguments = {"input_ids": inputs["input_ids"][:, piece], "past_key_values": cache}
        logits, cache = run(params, arguments)
        assert_same(logits, expected[:, piece])


def test_cached_images_outlive_their_call(params: Any):
    """A cache without room for images gets it when they come."""
    inputs = make_inputs([[(1, 3)]], [4])
    logits, cache = run(params, inputs | {"past_key_values": MODEL.init_cache(1, 6)})
    assert cache.num_image_tokens == NUM_TILES * NUM_PATCHES
    expected, _ = run(params, inputs)
    assert_same(logits, expected)


def test_layout():
    cache = mj.MllamaCache.create(TEXT, 2, 11, 7, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (4, 2, 2, 11, 6)
    assert cache.cross_keys.shape == cache.cross_values.shape == (2, 2, 2, 16, 6)
    assert cache.keys.dtype == cache.cross_values.dtype == jnp.bfloat16
    assert (cache.max_length, cache.num_image_tokens, int(cache.length)) == (11, 7, 0)
    assert MODEL.clone(dtype="bfloat16").init_cache(1, 3).keys.dtype == jnp.bfloat16
    without_images = mj.MllamaCache.create(TEXT, 2, 11)
    assert without_images.cross_keys is None
    assert without_images.num_image_tokens == 0


def test_legacy_round_trip_is_exact():
    random = np.random.default_rng(0)
    shapes = mj.MllamaCache.create(TEXT, 2, 5, 7)
    cache = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)
    cache = cache.replace(length=jnp.int32(5))
    images = (stack[:, :, :, :7] for stack in (cache.cross_keys, cache.cross_values))
    cache = cache.with_images(*images)
    back = mj.MllamaCache.from_legacy_cache(TEXT, cache.to_legacy_cache(TEXT), room=0)
    jax.tree.map(np.testing.assert_array_equal, back, cache)
    roomy = mj.MllamaCache.from_legacy_cache(TEXT, cache.to_legacy_cache(TEXT), room=3)
    assert (roomy.max_length, int(roomy.length)) == (8, 5)
    np.testing.assert_array_equal(roomy.keys[:, :, :, :5], cache.keys)


def test_writes_go_where_they_belong():
    cache = mj.MllamaCache.create(TEXT, 1, 4, 3)
    new = 1.0 + jnp.arange(4 * 2 * 2 * 6).reshape(4, 1, 2, 2, 6)
    cache = cache.append(jnp.int32(1), new, 2 * new)
    assert int(cache.length) == 3
    expected = np.zeros((4, 1, 2, 4, 6))
    expected[..., 1:3, :] = new
    keys, values = cache.read(jnp.int32(2))
    np.testing.assert_array_equal(keys, expected[2])
    np.testing.assert_array_equal(values, 2 * expected[2])
    larger = cache.with_slots(6)
    assert larger.max_length == 6
    np.testing.assert_array_equal(larger.keys[..., :4, :], expected)
    np.testing.assert_array_equal(larger.values[..., 4:, :], 0)
    images = 1.0 + jnp.arange(2 * 2 * 3 * 6).reshape(2, 1, 2, 3, 6)
    cache = cache.with_images(images, 3 * images)
    np.testing.assert_array_equal(cache.read_images(jnp.int32(1))[0], images[1])
    np.testing.assert_array_equal(cache.read_images(jnp.int32(1))[1], 3 * images[1])


TOKENS = np.ones((2, 4), np.int32)


def refuses(params: Any, message: str, **inputs: Any) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL.apply({"params": params}, **inputs)


def test_a_full_cache_is_refused(params: Any):
    cache = MODEL.init_cache(2, 6).replace(length=jnp.int32(3))
    message = "6 slots; 3 are used and 4 more are needed: make it larger"
    refuses(params, message, input_ids=TOKENS, past_key_values=cache)
    refuses(
        params,
        "past_key_values has 3 slots",
        input_ids=TOKENS,
        past_key_values=MODEL.init_cache(2, 3),
    )


def test_a_cache_of_another_batch_is_refused(params: Any):
    cache = MODEL.init_cache(3, 6)
    message = "past_key_values holds 3 samples, the inputs 2"
    refuses(params, message, input_ids=TOKENS, past_key_values=cache)


def test_other_images_are_refused(params: Any):
    cache = MODEL.init_cache(2, 6, 5)
    message = "holds 5 image tokens a sample, the new images have 7: images are given once"
    states = np.zeros((2, 7, 24), np.float32)
    refuses(params, message, input_ids=TOKENS, cross_attention_states=states, past_key_values=cache)


def test_a_legacy_cache_of_another_depth_is_refused(params: Any):
    layers = MODEL.init_cache(2, 6).to_legacy_cache(TEXT)[:-1]
    message = "past_key_values has 5 layers, the model 6"
    refuses(params, message, input_ids=TOKENS, past_key_values=layers)


def test_a_mask_longer_than_the_cache_is_refused(params: Any):
    message = "attention_mask covers 7 tokens, there are 6 slots"
    mask = np.ones((2, 7), np.int32)
    refuses(
        params,
        message,
        input_ids=TOKENS,
        attention_mask=mask,
        past_key_values=MODEL.init_cache(2, 6),
    )


@pytest.mark.parametrize("kind", ["reference", "xla", "splash_interpret"])
def test_samples_may_stand_at_different_slots(params: Any, kind: Any):
    """Each sample goes on where its own text ends, as it does alone."""
    model = MODEL.clone(attention=kind)
    inputs = make_inputs([[(1, 3), (4, 2)], [(0, 1)]], [8, 8])
    lengths = [3, 6]

    @jax.jit
    def run(inputs: dict[str, Any]) -> Any:
        output = model.apply({"params": params}, **inputs, use_cache=True)
        return output.logits, output.past_key_values

    caches, expected = [], []
    for sample, length in enumerate(lengths):
        own = {name: value[sample : sample + 1] for name, value in inputs.items()}
        cache = model.init_cache(1, T + 3, NUM_IMAGE_TOKENS)
        start = part(own, slice(0, length), images=True) | {"past_key_values": cache}
        start["attention_mask"] = start["attention_mask"][:, :length]
        caches.append(run(start)[1])
        expected.append(run(own)[0][:, length : length + 2])
    cache = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1) if x[0].ndim else x[0], *caches)
    cache = cache.replace(length=jnp.asarray(lengths, jnp.int32))
    rows = np.arange(2)
    for step in range(2):
        columns = np.asarray(lengths) + step
        new = {
            "input_ids": inputs["input_ids"][rows, columns][:, None],
            "cross_attention_mask": inputs["cross_attention_mask"][rows, columns][:, None],
            "past_key_values": cache,
        }
        logits, cache = run(new)
        for sample in rows:
            assert_same(logits[sample, 0], expected[sample][0, step])
    np.testing.assert_array_equal(cache.length, np.asarray(lengths) + 2)
