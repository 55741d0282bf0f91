"""The FLOP formula, next to what the model's own operations add up to."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_model import CONFIG, NUM_PATCHES, NUM_TILES, TILE

import mllama_jax as mj
from mllama_jax.flops import decoder_flops, total, vision_flops
from mllama_jax.plan.flops import job_flops
from mllama_jax.plan.job import Job
from mllama_jax.plan.models import RELEASED, num_parameters

B, T, M = 2, 7, 2
MODEL = mj.MllamaForConditionalGeneration(CONFIG, attention="reference")
TEXT, VISION = CONFIG.text_config, CONFIG.vision_config
PIXELS = jnp.zeros((B, M, NUM_TILES, *TILE))
IDS = jnp.ones((B, M), jnp.int32)
TOKENS = jnp.ones((B, T), jnp.int32)
# Pairs of causal self-attention that the textbook formula computes and the mask forbids.
FORBIDDEN = 4 * B * 4 * 24 * (T * (T - 1) // 2)


def products(function, *arguments):
    """Operations of all matrix products of a function, those of a scan for each of its steps."""
    return _products(jax.make_jaxpr(function)(*arguments).jaxpr)


def _products(jaxpr):
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            result = equation.outvars[0].aval.size
            count += 2 * result * math.prod(left[axis] for axis in contracted)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        count += repeats * sum(map(_products, jaxprs_in_params(equation.params)))
    return count


def table_products():
    """Embeddings of tiles are chosen by products, which are not counted as the model's work."""
    rows = VISION.max_aspect_ratio_id + 1
    return 2 * B * M * rows * NUM_TILES * VISION.hidden_size * (NUM_PATCHES + 2)


def encode(params, pixels, ids):
    return MODEL.apply({"params": params}, pixels, ids, method="encode_images")


def test_vision_and_projector_count_what_the_encoder_computes():
    counted = products(encode, MODEL.param_shapes(), PIXELS, IDS)
    assert total(vision_flops(CONFIG, B * M)) + table_products() == counted


@pytest.mark.parametrize("images", [0, M])
def test_decoder_counts_what_the_decoder_computes(images):
    states = None
    if images:
        states = jnp.zeros((B, images * NUM_TILES * NUM_PATCHES, TEXT.hidden_size))

    def forward(params, tokens, states):
        output = MODEL.apply({"params": params}, tokens, cross_attention_states=states)
        return output.logits

    counted = products(forward, MODEL.param_shapes(), TOKENS, states)
    assert total(decoder_flops(CONFIG, B, T, images)) + FORBIDDEN == counted


def test_a_cached_token_counts_what_one_step_computes():
    slots, image_tokens = 9, M * NUM_TILES * NUM_PATCHES
    cache = MODEL.init_cache(B, slots, image_tokens)

    def step(params, token, cache):
        return MODEL.apply({"params": params}, token, past_key_values=cache, use_cache=True).logits

    counted = products(step, MODEL.param_shapes(), TOKENS[:, :1], cache)
    flops = decoder_flops(CONFIG, B, 1, M, past=slots - 1, new_images=False)
    assert total(flops) == counted


def test_training_is_three_forward_passes():
    def loss(params):
        output = MODEL.apply(
            {"params": params}, TOKENS, PIXELS, aspect_ratio_ids=IDS, labels=TOKENS
        )
        return output.loss

    counted = products(jax.grad(loss), MODEL.param_shapes())
    job = Job(task="train", batch=B, length=T, images=M)
    formula = total(job_flops(job, CONFIG)) + 3 * FORBIDDEN
    # Pixels need no gradient, and tables of embeddings only one.
    assert formula == pytest.approx(counted, rel=0.03)
    assert formula > 2.5 * products(loss, MODEL.param_shapes())


def test_lora_has_no_backward_pass_before_the_decoder_and_no_weight_gradients():
    job = Job(task="lora", batch=B, length=T, images=M, rank=4)
    parts, forward = job_flops(job, CONFIG), vision_flops(CONFIG, B * M)
    assert parts["vision encoder"] == forward["vision encoder"]
    mlps = decoder_flops(CONFIG, B, T, M)["decoder MLPs"]
    assert parts["decoder MLPs"].total == 2 * mlps.total
    # Rank 4 on gate, up and down of six layers, among others.
    assert parts["adapters"].total > 3 * 2 * 4 * B * T * 6 * 3 * (24 + 38)


def test_released_models():
    config = RELEASED["11b"]
    image = vision_flops(config, 1)["vision encoder"].total
    assert image == pytest.approx(18.6e12, rel=5e-3)
    hundred_tokens = decoder_flops(config, 1, 100, 1, new_images=False)
    assert total(hundred_tokens) == pytest.approx(2e12, rel=0.05)
    assert num_parameters(config) == pytest.approx(10.67e9, rel=1e-3)
    assert num_parameters(RELEASED["90b"]) == pytest.approx(88.6e9, rel=1e-3)
