"""Call arguments: which combinations are refused, and what comes back in which order."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, NUM_PATCHES, NUM_TILES, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)

MODEL = mj.MllamaForConditionalGeneration(CONFIG)
TEXT_MODEL = mj.MllamaForCausalLM(CONFIG.text_config)
VISION_MODEL = mj.MllamaVisionModel(CONFIG.vision_config)
INPUTS = make_inputs([[(1, 3), (3, 1)], [(0, 2)]], [6, 6])
LABELS = np.where(INPUTS["input_ids"] < 61, INPUTS["input_ids"], -100)
EMBEDDINGS = np.zeros((2, 6, 24), np.float32)
STATES = np.ones((2, 2 * NUM_TILES * NUM_PATCHES, 24), np.float32)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, seed=2)


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in INPUTS.items() if name not in names}


IMAGE_FIELDS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
REFUSED = {
    "neither ids nor embeddings": (
        without("input_ids"),
        "exactly one of input_ids and inputs_embeds must be given",
    ),
    "both ids and embeddings": (
        INPUTS | {"inputs_embeds": EMBEDDINGS},
        "exactly one of input_ids and inputs_embeds must be given",
    ),
    "pixels and features": (
        INPUTS | {"cross_attention_states": STATES},
        "pixel_values and cross_attention_states exclude each other",
    ),
    "no aspect-ratio ids": (without("aspect_ratio_ids"), "pixel_values needs aspect_ratio_ids"),
    "pixels of another batch": (
        INPUTS | {name: INPUTS[name][:1] for name in IMAGE_FIELDS},
        "pixel_values has 1 samples, the text 2",
    ),
    "pixels without images' axis": (
        INPUTS | {"pixel_values": INPUTS["pixel_values"][:, 0]},
        r"pixel_values has shape \(2, 3, 3, 12, 12\), expected \(batch, images, 3, 3, 12, 12\)",
    ),
    "tiles of another size": (
        INPUTS | {"pixel_values": np.zeros((2, 2, 3, 3, 16, 16), np.float32)},
        r"pixel_values has shape .*expected \(batch, images, 3, 3, 12, 12\)",
    ),
    "too few aspect-ratio ids": (
        INPUTS | {"aspect_ratio_ids": INPUTS["aspect_ratio_ids"][:, :1]},
        r"aspect_ratio_ids has shape \(2, 1\), expected \(2, 2\)",
    ),
    "an aspect-ratio mask of fewer tiles": (
        INPUTS | {"aspect_ratio_mask": INPUTS["aspect_ratio_mask"][..., :2]},
        r"aspect_ratio_mask has shape \(2, 2, 2\), expected \(2, 2, 3\)",
    ),
    "a cross-attention mask of fewer images": (
        INPUTS | {"cross_attention_mask": INPUTS["cross_attention_mask"][:, :, :1]},
        r"cross_attention_mask has shape \(2, 6, 1, 3\), expected \(batch, tokens, 2, 3\)",
    ),
    "a cross-attention mask of fewer tokens": (
        INPUTS | {"cross_attention_mask": INPUTS["cross_attention_mask"][:, :4]},
        r"cross_attention_mask has shape \(2, 4, 2, 3\), expected \(batch=2, tokens=6, images",
    ),
    "a cross-attention mask that does not divide the features": (
        without(*IMAGE_FIELDS) | {"cross_attention_states": STATES[:, :-1]},
        "with 59 image tokens a sample",
    ),
    "features of another size": (
        without(*IMAGE_FIELDS) | {"cross_attention_states": STATES[..., :-1]},
        r"cross_attention_states has shape \(2, 60, 23\).*hidden_size=24",
    ),
    "features of another batch": (
        without(*IMAGE_FIELDS) | {"cross_attention_states": STATES[[0, 1, 1]]},
        r"cross_attention_states has shape \(3, 60, 24\), expected \(batch=2",
    ),
    "an attention mask of another batch": (
        INPUTS | {"attention_mask": INPUTS["attention_mask"][:1]},
        r"attention_mask has shape \(1, 6\), expected \(2, 6\)",
    ),
    "an attention mask of more tokens": (
        INPUTS | {"attention_mask": np.ones((2, 9), np.int32)},
        r"attention_mask has shape \(2, 9\), expected \(2, 6\)",
    ),
    "an attention mask of fewer tokens": (
        INPUTS | {"attention_mask": np.ones((2, 5), np.int32), "use_cache": False},
        r"attention_mask has shape \(2, 5\), expected \(2, 6\)",
    ),
    "ids without a batch": (
        {"input_ids": INPUTS["input_ids"][0]},
        r"input_ids has shape \(6,\), expected \(batch, tokens\)",
    ),
    "embeddings of another size": (
        without("input_ids") | {"inputs_embeds": EMBEDDINGS[..., 1:]},
        r"inputs_embeds has shape \(2, 6, 23\), expected \(batch, tokens, hidden_size=24\)",
    ),
    "positions of fewer tokens": (
        INPUTS | {"position_ids": np.zeros((2, 1), np.int32)},
        r"position_ids has shape \(2, 1\), expected \(2, 6\) or \(1, 6\)",
    ),
    "one slot for all tokens": (
        INPUTS | {"cache_position": np.zeros(1, np.int32)},
        r"cache_position has shape \(1,\), expected \(6,\)",
    ),
    "labels of fewer tokens": (
        INPUTS | {"labels": LABELS[:, :5]},
        r"labels has shape \(2, 5\), expected \(2, 6\): one for each logit",
    ),
    "labels of logits that are not kept": (
        INPUTS | {"labels": LABELS, "num_logits_to_keep": 2},
        r"labels has shape \(2, 6\), expected \(2, 2\).*num_logits_to_keep=2",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_wrong_combinations_are_refused(params: Any, case: str):
    inputs, message = REFUSED[case]
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    static = {name: value for name, value in inputs.items() if name not in arrays}
    with pytest.raises(ValueError, match=message):
        # Shapes alone decide, so nothing is computed.
        jax.eval_shape(lambda a: MODEL.apply({"params": params}, **a, **static), arrays)


def test_text_model_refuses_the_same(params: Any):
    language_model = {"params": params["language_model"]}
    with pytest.raises(ValueError, match=r"has shape \(2, 6\), expected \(2, 1, 6, 1\)"):
        TEXT_MODEL.apply(
            language_model,
            INPUTS["input_ids"],
            cross_attention_states=STATES,
            full_text_row_masked_out_mask=np.ones((2, 6), np.float32),
        )
    for inputs in ({}, {"input_ids": INPUTS["input_ids"], "inputs_embeds": EMBEDDINGS}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            TEXT_MODEL.apply(language_model, **inputs)


DOCUMENTED = [
    *("input_ids", "pixel_values", "aspect_ratio_mask", "aspect_ratio_ids", "attention_mask"),
    *("cross_attention_mask", "cross_attention_states", "position_ids", "past_key_values"),
    *("inputs_embeds", "labels", "use_cache", "output_attentions", "output_hidden_states"),
    *("return_dict", "cache_position", "num_logits_to_keep"),
]
DOCUMENTED_TEXT = [
    *("input_ids", "attention_mask", "position_ids", "cross_attention_states"),
    *("cross_attention_mask", "full_text_row_masked_out_mask", "past_key_values", "inputs_embeds"),
    *("labels", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("cache_position", "num_logits_to_keep"),
]
DOCUMENTED_VISION = [
    *("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "output_attentions"),
    *("output_hidden_states", "return_dict"),
]


OUR_OWN = {"num_tiles", "segment_ids"}


@pytest.mark.parametrize(
    ("model_cls", "documented"),
    [
        (mj.MllamaForConditionalGeneration, DOCUMENTED),
        (mj.MllamaForCausalLM, DOCUMENTED_TEXT),
        (mj.MllamaTextModel, [n for n in DOCUMENTED_TEXT if n not in ("labels", DOCUMENTED[-1])]),
        (mj.MllamaVisionModel, DOCUMENTED_VISION),
    ],
)
def test_arguments_are_hugging_faces_in_order(model_cls: type, documented: list[str]):
    parameters = inspect.signature(model_cls.__call__).parameters
    names = [name for name in parameters if name not in OUR_OWN]
    assert names == ["self", *documented]
    assert set(list(parameters)[len(names) :]) <= OUR_OWN
    for name, parameter in parameters.items():
        if name == "num_logits_to_keep":
            assert parameter.default == 0
        elif name not in ("self", "pixel_values", "aspect_ratio_ids"):
            assert parameter.default is None, name


@pytest.fixture(scope="module")
def outputs(params: Any) -> dict[str, Any]:
    """Calls of the whole model, compiled together."""
    everything = {"use_cache": True, "output_attentions": True, "output_hidden_states": True}
    rest = without(*IMAGE_FIELDS)

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        def call(method: Any = None, **inputs: Any) -> Any:
            return MODEL.apply({"params": params}, **inputs, method=method)

        images = {name: INPUTS[name] for name in IMAGE_FIELDS}
        states = call("encode_images", **images)
        table = params["language_model"]["model"]["embed_tokens"]["embedding"]
        features = {**rest, "cross_attention_states": states}
        return {
            "plain": call(**INPUTS, use_cache=False),
            "everything": call(**INPUTS, **everything, labels=LABELS),
            "tuple": call(**INPUTS, **everything, labels=LABELS, return_dict=False),
            "logits in a tuple": call(**features, use_cache=False, return_dict=False),
            "features": call(**features, use_cache=False),
            "embeddings": call(
                **{k: v for k, v in features.items() if k != "input_ids"},
                inputs_embeds=table[INPUTS["input_ids"]],
                use_cache=False,
            ),
            "last two": call(**features, num_logits_to_keep=2, use_cache=False),
            "no tile mask": call(
                **{k: v for k, v in features.items() if k != "cross_attention_mask"},
                use_cache=False,
            ),
            "all tiles": call(
                **features
                | {"cross_attention_mask": jnp.ones_like(INPUTS["cross_attention_mask"])},
                use_cache=False,
            ),
            "default": call(**features),
        }

    return run(params)


def assert_same(ours: Any, expected: Any) -> None:
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_flags_decide_what_is_returned(outputs: dict[str, Any]):
    plain, everything = outputs["plain"], outputs["everything"]
    assert isinstance(plain, CausalLMOutputWithPast)
    for name in ("loss", "past_key_values", "hidden_states", "attentions"):
        assert plain[name] is None
        assert everything[name] is not None
    assert plain.to_tuple()[0] is plain[0] is plain.logits
    assert everything.logits.shape == (2, 6, 61)
    assert everything.loss.shape == ()
    assert [state.shape for state in everything.hidden_states] == [(2, 6, 24)] * 7
    keys = [60 if CONFIG.text_config.is_cross_attention_layer(i) else 6 for i in range(6)]
    assert [weights.shape for weights in everything.attentions] == [(2, 4, 6, n) for n in keys]
    assert_same(everything.logits, plain.logits)


def test_tuples_are_in_hugging_faces_order(outputs: dict[str, Any]):
    everything, as_tuple = outputs["everything"], outputs["tuple"]
    names = ("loss", "logits", "past_key_values", "hidden_states", "attentions")
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(names)
    for value, name in zip(as_tuple, names, strict=True):
        jax.tree.map(np.testing.assert_array_equal, value, everything[name])
    (logits,) = outputs["logits in a tuple"]
    assert_same(logits, outputs["plain"].logits)


def test_cache_is_returned_by_default(outputs: dict[str, Any]):
    cache = outputs["default"].past_key_values
    assert isinstance(cache, mj.MllamaCache)
    assert (cache.max_length, cache.num_image_tokens, int(cache.length)) == (6, 60, 6)
    config = CONFIG.text_config.to_dict() | {"use_cache": False}
    model = mj.MllamaForCausalLM(mj.MllamaTextConfig.from_dict(config))
    shapes = jax.eval_shape(
        lambda params: model.apply({"params": params}, INPUTS["input_ids"]), model.param_shapes()
    )
    assert shapes.past_key_values is None


def test_features_and_embeddings_stand_for_pixels_and_ids(outputs: dict[str, Any]):
    for name in ("features", "embeddings"):
        assert_same(outputs[name].logits, outputs["plain"].logits)


def test_only_the_last_logits(outputs: dict[str, Any]):
    assert outputs["last two"].logits.shape == (2, 2, 61)
    assert_same(outputs["last two"].logits, outputs["plain"].logits[:, -2:])


def test_no_tile_mask_means_all_tiles(outputs: dict[str, Any]):
    assert_same(outputs["no tile mask"].logits, outputs["all tiles"].logits)


def test_loss_is_the_mean_over_labels_that_count(outputs: dict[str, Any]):
    logits = np.asarray(outputs["everything"].logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = [
        log_probabilities[b, t - 1, LABELS[b, t]]
        for b in range(2)
        for t in range(1, 6)
        if LABELS[b, t] != -100
    ]
    assert len(counted) == 8  # ten, less two image tokens; the third stands first
    np.testing.assert_allclose(outputs["everything"].loss, -np.mean(counted), rtol=1e-5)


def test_vision_output_and_its_tuple(params: Any):
    images = {name: INPUTS[name] for name in IMAGE_FIELDS}
    flags = {"output_hidden_states": True, "output_attentions": True}

    @jax.jit
    def run(params: Any) -> Any:
        variables = {"params": params["vision_model"]}
        as_tuple = VISION_MODEL.apply(variables, **images, **flags, return_dict=False)
        no_mask = {name: images[name] for name in IMAGE_FIELDS[:2]}
        return as_tuple, VISION_MODEL.apply(variables, **no_mask)

    (last, states, weights), output = run(params)
    assert isinstance(output, BaseModelOutput)
    assert last.shape == (2, 2, 3, 10, 60)
    assert [state.shape for state in states] == [(4, 48, 20)] * (2 + 2 + 1)
    assert [w.shape for w in weights] == [(4, 2, 48, 48)] * (3 + 2)
    # The tile mask follows from the ids.
    assert_same(output.last_hidden_state, last)


def test_text_model_output():
    model = mj.MllamaTextModel(CONFIG.text_config)

    def run(**flags: Any) -> Any:
        def apply(params: Any) -> Any:
            return model.apply({"params": params}, INPUTS["input_ids"], **flags)

        return jax.eval_shape(apply, model.param_shapes())

    output = run()
    assert isinstance(output, BaseModelOutputWithPast)
    assert output.last_hidden_state.shape == (2, 6, 24)
    assert len(run(return_dict=False)) == 2
    last, states, weights = run(
        use_cache=False, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    assert last.shape == (2, 6, 24)
    assert len(states) == 7  # a layer that is skipped has an input all the same
    assert len(weights) == 4


def test_documented_calls():
    """The shapes that Hugging Face's pages print, for the configuration that they load."""
    vision = mj.MllamaVisionModel(mj.MllamaConfig())
    text = mj.MllamaTextModel(mj.MllamaConfig())

    def encode(params: Any, pixel_values: Any) -> Any:
        ids = jnp.ones((1, 1), jnp.int32)
        return vision.apply({"params": params}, pixel_values, ids).last_hidden_state

    pixels = jax.ShapeDtypeStruct((1, 1, 4, 3, 448, 448), jnp.float32)
    encoded = jax.eval_shape(encode, vision.param_shapes(), pixels)
    assert encoded.shape == (1, 1, 4, 1025, 7680)

    def decode(params: Any, input_ids: Any) -> Any:
        return text.apply({"params": params}, input_ids=input_ids).last_hidden_state

    ids = jax.ShapeDtypeStruct((1, 13), jnp.int32)
    assert jax.eval_shape(decode, text.param_shapes(), ids).shape == (1, 13, 4096)


def test_unknown_attention_kind_is_refused():
    with pytest.raises(ValueError, match="attention='flash': expected one of reference, xla"):
        mj.MllamaForConditionalGeneration(CONFIG, attention="flash")  # type: ignore[arg-type]


def test_loss_without_a_label_is_not_a_number(params: Any):
    labels = np.full((2, 6), -100)
    loss = jax.jit(
        lambda p: TEXT_MODEL.apply({"params": p}, INPUTS["input_ids"], labels=labels).loss
    )(params["language_model"])
    assert np.isnan(loss)
