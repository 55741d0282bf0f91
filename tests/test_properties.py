"""What must hold of the model whatever its weights are, with its default semantics."""

from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
from tiny_model import CONFIG, NUM_PATCHES, NUM_TILES, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.execution import REMAT_POLICIES

# Two pictures, one and none; (place, aspect-ratio id) each.
IMAGES = [[(2, 3), (5, 2)], [(1, 1)], []]
LENGTHS = [9, 6, 7]
MODEL = mj.MllamaForConditionalGeneration(CONFIG)
Inputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@jax.jit
def logits(params: Any, inputs: Inputs) -> jax.Array:
    return MODEL.apply({"params": params}, **inputs, use_cache=False).logits


def assert_same(ours: Any, expected: Any, tolerance: float = 2e-5) -> None:
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(ours, expected, atol=tolerance * scale, rtol=0)


def real_logits(params: Any, inputs: Inputs) -> list[np.ndarray]:
    """Each row's logits, without its padding."""
    rows = np.asarray(logits(params, inputs))
    masks = inputs["attention_mask"].astype(bool)
    return [row[mask] for row, mask in zip(rows, masks, strict=True)]


def test_a_row_is_the_same_alone_and_in_any_batch(params: Any):
    together = real_logits(params, make_inputs(IMAGES, LENGTHS))
    for b in range(3):
        (alone,) = real_logits(params, make_inputs([IMAGES[b]], [LENGTHS[b]], seed=b))
        assert_same(together[b], alone)


def test_rows_may_change_places(params: Any):
    inputs = make_inputs(IMAGES, LENGTHS)
    order = [2, 0, 1]
    moved = real_logits(params, {name: value[order] for name, value in inputs.items()})
    expected = real_logits(params, inputs)
    for row, b in zip(moved, order, strict=True):
        assert_same(row, expected[b])


def test_padding_side_does_not_matter(params: Any):
    right = real_logits(params, make_inputs(IMAGES, LENGTHS, "right"))
    left = real_logits(params, make_inputs(IMAGES, LENGTHS, "left"))
    for row, expected in zip(left, right, strict=True):
        assert_same(row, expected)


@jax.jit
def _influence(params: Any, inputs: Inputs, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    table = params["language_model"]["model"]["embed_tokens"]["embedding"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")}

    def total(pixels: jax.Array, embeddings: jax.Array) -> jax.Array:
        variables = {"params": params}
        out = MODEL.apply(variables, pixel_values=pixels, inputs_embeds=embeddings, **rest)
        return (jnp.square(out.logits) * weights_BT[..., None]).sum()

    return jax.grad(total, (0, 1))(inputs["pixel_values"], table[inputs["input_ids"]])


def influence(
    params: Any, inputs: Inputs, sample: int, tokens: slice
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (B, M) and tokens (B, T) that the logits of some tokens depend on."""
    weights = np.zeros(inputs["input_ids"].shape, np.float32)
    weights[sample, tokens] = 1
    pixels, embeddings = jax.device_get(_influence(params, inputs, weights))
    assert np.isfinite(pixels).all()
    assert np.isfinite(embeddings).all()
    return np.any(pixels, axis=(2, 3, 4, 5)), np.any(embeddings, axis=-1)


def test_tokens_before_a_picture_do_not_depend_on_it(params: Any):
    inputs = make_inputs(IMAGES, LENGTHS)
    nothing, first, both = [False, False], [True, False], [True, True]
    for tokens, expected in ((slice(0, 2), nothing), (slice(2, 5), first), (slice(5, 9), both)):
        pictures, _ = influence(params, inputs, 0, tokens)
        # Nor does any token depend on another sample's pictures.
        np.testing.assert_array_equal(pictures, [expected, nothing, nothing])
    pictures, _ = influence(params, inputs, 1, slice(1, 6))
    np.testing.assert_array_equal(pictures, [nothing, first, nothing])  # its second is missing
    pictures, _ = influence(params, inputs, 2, slice(0, 7))
    assert not pictures.any()


def test_a_picture_is_hidden_once_the_next_begins(params: Any):
    """Save through the text between them, which is taken away here."""
    inputs = make_inputs(IMAGES, LENGTHS)
    inputs["attention_mask"][0, 2:5] = 0
    pictures, tokens = influence(params, inputs, 0, slice(5, 9))
    np.testing.assert_array_equal(pictures[0], [False, True])
    np.testing.assert_array_equal(tokens[0], [True] * 2 + [False] * 3 + [True] * 4)


@pytest.mark.parametrize("token", [0, 3, 6])
def test_tokens_do_not_depend_on_later_ones(params: Any, token: int):
    inputs = make_inputs(IMAGES, LENGTHS)
    _, tokens = influence(params, inputs, 0, slice(token, token + 1))
    np.testing.assert_array_equal(tokens[0], np.arange(9) <= token)
    assert not tokens[1:].any()


def test_tokens_do_not_depend_on_padding(params: Any):
    inputs = make_inputs(IMAGES, LENGTHS, "left")
    _, tokens = influence(params, inputs, 1, slice(8, 9))
    np.testing.assert_array_equal(tokens[1], inputs["attention_mask"][1])


def test_text_only_equals_a_plain_llama(params: Any, tmp_path: Path):
    """The cross-attention layers removed from the checkpoint, the rest is a Llama."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

    config = CONFIG.text_config
    mj.MllamaForCausalLM(config).save_pretrained(params["language_model"], tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = [i for i in range(6) if i not in config.cross_attention_layers]
    weights = {}
    for name, value in tensors.items():
        head, _, rest = name.partition("layers.")
        index, _, leaf = rest.partition(".")
        if not rest:
            weights[name] = value[: config.vocab_size]  # the image token has no logit
        elif int(index) in kept:
            weights[f"{head}layers.{kept.index(int(index))}.{leaf}"] = value
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=len(kept),
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            pad_token_id=0,
        )
    )
    weights["model.norm.weight"] = tensors["model.norm.weight"]
    llama.load_state_dict(weights)
    inputs = make_inputs([[], []], [8, 5])
    with torch.no_grad():
        expected = llama(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}).logits
    expected = expected.numpy()[inputs["attention_mask"].astype(bool)]
    assert_same(np.concatenate(real_logits(params, inputs)), expected)


def test_same_shapes_compile_once(params: Any):
    """Pictures, spans, lengths and the padding's side are data; only shapes make programs."""
    traced: list[Any] = []

    @jax.jit
    def step(params: Any, inputs: Inputs, cache: mj.MllamaCache) -> Any:
        traced.append(inputs["input_ids"].shape)
        output = MODEL.apply({"params": params}, **inputs, past_key_values=cache)
        return output.logits, output.past_key_values

    images = ([[(0, 1), (3, 2)], [(2, 3)]], [[(1, 2)], [(0, 1), (2, 3)]], [[(4, 3), (5, 1)], []])
    for seed, (places, side) in enumerate(zip(images, ("left", "right", "left"), strict=True)):
        inputs = make_inputs(places, [6, 6 - seed], side, seed)
        tiles = inputs["cross_attention_mask"]
        _, cache = step(params, inputs, MODEL.init_cache(2, 9, 2 * 3 * 10))
        for _ in range(3):
            mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 3)), constant_values=1)
            inputs = {"input_ids": np.full((2, 1), seed + 3, np.int32), "attention_mask": mask}
            inputs["cross_attention_mask"] = tiles[:, -1:]
            _, cache = step(params, inputs, cache)
            inputs["attention_mask"] = mask[:, :6]
    assert traced == [(2, 6), (2, 1)]


@pytest.mark.parametrize("layers", [list(c) for n in range(4) for c in combinations(range(3), n)])
def test_any_cross_attention_layers(layers: list[int]):
    """Every choice among three layers, prompt and step; shapes only."""
    values = CONFIG.to_dict()
    values["text_config"] |= {"num_hidden_layers": 3, "cross_attention_layers": layers}
    model = mj.MllamaForConditionalGeneration(mj.MllamaConfig.from_dict(values))
    inputs = make_inputs(IMAGES, LENGTHS)

    def run(params: Any) -> Any:
        everything = {"output_hidden_states": True, "output_attentions": True}
        cache = model.init_cache(3, 10, 2 * NUM_TILES * NUM_PATCHES)
        output = model.apply({"params": params}, **inputs, **everything, past_key_values=cache)
        token, cache = inputs["input_ids"][:, :1], output.past_key_values
        return output, model.apply({"params": params}, token, past_key_values=cache)

    output, step = jax.eval_shape(run, model.param_shapes())
    assert output.logits.shape == (3, 9, 61)
    assert (len(output.hidden_states), len(output.attentions)) == (4, 3)
    assert step.logits.shape == (3, 1, 61)
    assert step.past_key_values.cross_keys.shape[0] == len(layers)


def all_equations(jaxpr: Any) -> list[Any]:
    """The equations of a program, those of its loops included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inner = [j for e in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(e.params)]
    return [*jaxpr.eqns, *(e for j in inner for e in all_equations(j))]


def test_program_does_not_grow_with_depth():
    def equations(repeats: int) -> int:
        values = CONFIG.to_dict()
        values["text_config"] |= {
            "num_hidden_layers": 3 * repeats,
            "cross_attention_layers": list(range(1, 3 * repeats, 3)),
        }
        values["vision_config"] |= {"num_hidden_layers": 3 * repeats, "num_global_layers": repeats}
        model = mj.MllamaForConditionalGeneration(mj.MllamaConfig.from_dict(values))
        inputs = make_inputs(IMAGES, LENGTHS)
        run = lambda params: model.apply({"params": params}, **inputs).logits  # noqa: E731
        return len(all_equations(jax.make_jaxpr(run)(model.param_shapes())))

    assert equations(2) == equations(7)


def test_rematerialisation_changes_nothing_but_memory(params: Any):
    inputs = make_inputs([[(1, 2)], []], [5, 4])
    labels = np.where(inputs["input_ids"] < 61, inputs["input_ids"], -100)
    expected, kept_bytes = None, []
    for remat in REMAT_POLICIES:  # from most to least memory
        model = MODEL.clone(remat=remat)

        def loss(params: Any, model: Any = model) -> jax.Array:
            return model.apply({"params": params}, **inputs, labels=labels).loss

        for_backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        kept_bytes.append(sum(leaf.size for leaf in jax.tree.leaves(for_backward)))
        found = jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))
        expected = expected or found
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    assert kept_bytes == sorted(set(kept_bytes), reverse=True)


def test_unknown_rematerialisation_is_refused():
    with pytest.raises(ValueError, match="remat='some': expected one of none, dots"):
        MODEL.clone(remat="some")


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_bfloat16_stays_near_float32(params: Any, param_dtype: str):
    inputs = make_inputs(IMAGES, LENGTHS)
    expected = np.asarray(logits(params, inputs))
    model = MODEL.clone(dtype=jnp.bfloat16)
    cast = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    output = jax.jit(model.apply)({"params": cast}, **inputs)
    assert output.logits.dtype == jnp.float32
    assert output.past_key_values.keys.dtype == jnp.bfloat16
    assert output.past_key_values.cross_keys.dtype == jnp.bfloat16
    real = inputs["attention_mask"].astype(bool)
    difference = (np.asarray(output.logits) - expected)[real]
    assert np.abs(difference).max() < 0.1 * np.abs(expected).max()
    assert np.sqrt(np.mean(difference**2)) < 0.02 * np.std(expected)


def test_attention_kinds_give_the_same_logits(params: Any):
    inputs = make_inputs(IMAGES, LENGTHS)
    model = MODEL.clone(attention="reference")
    ours = jax.jit(model.apply)({"params": params}, **inputs).logits
    assert_same(ours, logits(params, inputs))
