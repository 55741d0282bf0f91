"""Weights of the decoder's layers in few bits: how they are made, and what comes out."""

import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from asking import (
    EXAMPLE,
    LOADED,
    OPTIONS,
    PICTURES,
    PROCESSOR,
    answers,
    ask,
    tokens,
    whole_messages,
)
from processes import results, start
from scipy.stats import norm
from tiny_checkpoint import arrays, save_tensors
from tiny_model import random_params

import mllama_jax as mj
from mllama_jax.batch.engine import Engine
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.cli import main
from mllama_jax.convert import CheckpointError, quantising
from mllama_jax.convert.table import tensors
from mllama_jax.plan.job import Job
from mllama_jax.plan.programs import bytes_a_device, make_model, placed_params
from mllama_jax.quantisation import (
    NORMAL_FLOATS,
    _looked_up,
    _normal_floats,
    _selected,
    dequantised,
    product,
    quantised,
)
from mllama_jax.quantisation_report import compare, weight_errors
from mllama_jax.sharding import parse_mesh
from mllama_jax.train.components import joined
from mllama_jax.train.lora import init_adapters, merged
from mllama_jax.train.settings import LoraConfig, Recipe, TrainedConfig
from mllama_jax.train.step import start as start_training

MODEL = EXAMPLE / "model"
KINDS = ("int8", "int4", "nf4")
DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.uint4}
QUANTISED = re.compile(
    r"language_model.*\.layers\.\d+\.(self_attn|cross_attn|mlp)\..*_proj\.weight"
)
GROUPS = {"q": 32, "k": 32, "v": 32, "gate": 32, "up": 32, "o": 16, "down": 64}
"""Of the example model's projections: 96 hidden, 192 feed-forward, heads of 16."""


def normal_floats() -> np.ndarray:
    """As the paper derives them: quantiles, of which seven are below zero and eight above."""
    outermost = 0.9677083  # (1 - 1/30 + 1 - 1/32) / 2
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    return np.sort([*below, 0, *above]) / above.max()


TABLES = {"int8": np.arange(-127.0, 128), "int4": np.arange(-7.0, 8), "nf4": normal_floats()}


def defined(weights: np.ndarray, kind: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of a stored matrix (outputs, inputs), in float64 and with loops."""
    table, group = TABLES[kind], weights.shape[1] if kind == "int8" else group
    values, meant = np.zeros(weights.shape), np.zeros(weights.shape)
    for output, row in enumerate(weights.astype(np.float64)):
        for start_ in range(0, len(row), group):
            span = slice(start_, start_ + group)
            scale = float(np.float32(np.abs(row[span]).max()) / np.float32(table[-1]))
            if scale > 0:
                values[output, span] = table[distances(row[span] / scale, kind).argmin(1)]
            meant[output, span] = values[output, span] * scale
    return values, meant


def distances(ratios: np.ndarray, kind: str) -> np.ndarray:
    """From each value of the table, on a last axis."""
    return np.abs(ratios[..., None] - TABLES[kind])


def values_of(stored: np.ndarray, kind: str) -> np.ndarray:
    return TABLES["nf4"][stored.astype(int)] if kind == "nf4" else stored.astype(float)


def replaced(stored: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """A checkpoint's tensors with what the integers stand for."""
    changed = {
        name: defined(values, kind, GROUPS[name.split(".")[-2].removesuffix("_proj")])[1]
        for name, values in stored.items()
        if QUANTISED.search(name)
    }
    assert len(changed) == 6 * 7
    return stored | {name: values.astype(np.float32) for name, values in changed.items()}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """As transformers computes, rows that see no picture included."""
    load = partial(mj.MllamaForConditionalGeneration.from_pretrained, hf_masked_rows=True)
    return {"float32": load(MODEL), **{kind: load(MODEL, quantise=kind) for kind in KINDS}}


@pytest.fixture(scope="module")
def meant(tmp_path_factory) -> dict[str, Path]:
    """Unquantised checkpoints of the very weights that the integers stand for."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind) / "model"
        shutil.copytree(MODEL, folders[kind])
        save_tensors(replaced(arrays(MODEL), kind), MODEL, folders[kind])
    return folders


@partial(jax.jit, static_argnums=0)
def logits(model: Any, params: Any, inputs: dict[str, Any]) -> Any:
    return model.apply({"params": params}, **inputs, use_cache=False).logits


def batch() -> dict[str, np.ndarray]:
    """A question about two pictures, and one about none."""
    texts, images = [], []
    for count in (2, 0):
        content = [{"type": "image"}] * count + [{"type": "text", "text": "Which digit is this?"}]
        texts.append(
            PROCESSOR.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        )
        images.append([str(path) for path in PICTURES[:count]])
    return dict(PROCESSOR(images=images, text=texts, padding=True, return_tensors="np"))


# Definition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [((64,), (3, 5)), ((3, 32), (7,)), ((256,), (6,))])
def test_integers_and_scales_are_as_defined(kind, inputs, outputs, dtype):
    random = np.random.default_rng(1)
    weights = random.normal(size=(*inputs, *outputs)).astype(dtype)
    weights[..., -1] = 0
    weights.reshape(-1, math.prod(outputs))[5, 0] = 100
    stored, scale = quantised(weights, kind, len(inputs))
    assert (stored.dtype, scale.dtype) == (DTYPES[kind], np.float32)
    group = min(inputs[-1], 64 if kind == "nf4" else 128)
    as_stored = weights.reshape(-1, math.prod(outputs)).T
    expected, meant = defined(as_stored, kind, group)
    found = values_of(stored, kind).reshape(-1, math.prod(outputs))
    assert np.abs(found).max() == TABLES[kind][-1]
    spread = np.repeat(
        scale.reshape(-1, math.prod(outputs)), 1 if kind == "int8" else group, axis=0
    )
    # Half of a step may be rounded either way by the division in float32.
    ratios = as_stored.T.astype(np.float64) / np.where(spread > 0, spread, 1)
    nearest = np.sort(distances(ratios, kind))
    is_half = nearest[..., 1] - nearest[..., 0] < 2e-5
    assert ((found == expected.T) | is_half).all()
    assert is_half.mean() < 0.01
    step = np.diff(TABLES[kind]).max() * spread
    assert (np.abs(as_stored.T.astype(np.float64) - found * spread) <= 0.501 * step).all()
    np.testing.assert_allclose(found * spread, meant.T, atol=1.001 * step.max() * is_half.any())
    x = random.normal(size=(2, *inputs)).astype(np.float32)
    expected_product = x.reshape(2, -1) @ (found * spread.astype(np.float64))
    result = product(x, jnp.asarray(stored), scale, len(inputs), jnp.float32)
    np.testing.assert_allclose(
        np.asarray(result).reshape(2, -1),
        expected_product,
        atol=1e-4 * np.abs(expected_product).max(),
    )


def test_sums_of_int8_do_not_overflow_float16():
    weights = np.full((4096, 2), 0.01, np.float32)
    kernel, scale = quantised(weights, "int8", 1)
    result = product(jnp.ones((1, 4096)), kernel, scale, 1, jnp.float16)
    np.testing.assert_allclose(result, 40.96, rtol=1e-3)


def test_normal_floats_are_those_of_bitsandbytes():
    """Also what is made of weights, where the rounding of a division does not decide."""
    stored = arrays(MODEL)["language_model.model.layers.4.mlp.down_proj.weight"]
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.from_numpy(stored.copy()), blocksize=64, quant_type="nf4"
    )
    expected = np.stack([packed.numpy() >> 4, packed.numpy() & 15], -1).reshape(stored.shape)
    kernel, scale = quantised(stored.T, "nf4", 1)
    np.testing.assert_array_equal(scale.T.ravel(), state.absmax)
    np.testing.assert_array_equal(np.float32(NORMAL_FLOATS), state.code)
    np.testing.assert_allclose(NORMAL_FLOATS, TABLES["nf4"], atol=1e-7)
    different = kernel.T.astype(int) != expected
    assert different.mean() < 1e-4
    weights = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    found = np.asarray(dequantised(kernel, scale, 1)).T
    np.testing.assert_array_equal(found[~different], weights[~different])


def test_tpus_select_the_values_that_others_look_up():
    places = jnp.arange(16, dtype=jnp.uint4)
    for values in (_selected(places), _looked_up(places)):
        np.testing.assert_array_equal(values, np.float32(NORMAL_FLOATS))
    traced = jax.jit(_normal_floats).trace(places)
    for platform, gathers in {"tpu": False, "cpu": True, "cuda": True}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("gather" in text) == gathers


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4])
def test_two_numbers_of_four_bits_share_a_byte(dtype):
    least = jnp.iinfo(dtype).min
    values = np.arange(least, least + 16).repeat(64).reshape(4, 8, 32).astype(dtype)
    array = jax.device_put(values)
    np.testing.assert_array_equal(np.asarray(array).astype(int), values.astype(int))
    compiled = jax.jit(lambda x: x.astype(jnp.int8) + jnp.int8(1)).lower(array).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == values.size // 2
    np.testing.assert_array_equal(compiled(array), values.astype(int) + 1)


# Loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kernels_of_the_decoders_layers_change(kind, loaded):
    model, params = loaded[kind]
    found = flax.traverse_util.flatten_dict(params, sep="/")
    shapes = flax.traverse_util.flatten_dict(model.param_shapes(), sep="/")
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in shapes.items()
    }
    before = flax.traverse_util.flatten_dict(LOADED[1], sep="/")
    stacked = {tensor.hub: "/".join(tensor.path) for tensor in tensors(model.config, "model")}
    integers = {path for name, path in stacked.items() if QUANTISED.search(name)}
    assert len(integers) == 3 * 7  # blocks of a unit, projections of each
    for name, value in before.items():
        if name in integers:
            assert found.pop(name).dtype == DTYPES[kind]
            assert found.pop(name.removesuffix("kernel") + "scale").dtype == jnp.float32
        else:
            now = found.pop(name)
            assert (now.dtype, np.asarray(now).tobytes()) == (
                value.dtype,
                np.asarray(value).tobytes(),
            )
    assert not found


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_stored_dtypes_do_not_matter(kind, monkeypatch):
    """Integers are made of what is stored, however it is read, and not of what it is cast to."""
    _, expected = mj.MllamaForCausalLM.from_pretrained(MODEL, quantise=kind)
    monkeypatch.setattr(quantising, "_BLOCK_BYTES", 1000)
    _, found = mj.MllamaForCausalLM.from_pretrained(MODEL, quantise=kind, param_dtype="bfloat16")
    expected, found = map(flax.traverse_util.flatten_dict, (expected, found))
    integers = [path for path, value in expected.items() if value.dtype == DTYPES[kind]]
    assert len(integers) == 3 * 7
    for path in (*integers, *((*path[:-1], "scale") for path in integers)):
        assert np.asarray(found[path]).tobytes() == np.asarray(expected[path]).tobytes(), path
    assert found["lm_head", "kernel"].dtype == jnp.bfloat16


SHARDED = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "cross_attention_layers": [1, 3],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MESHES = ("fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    config = mj.MllamaTextConfig(**SHARDED)
    model = mj.MllamaForCausalLM(config)
    model.save_pretrained(random_params(model), folder)
    process = start("quantised_devices.py", 8, folder, json.dumps(MESHES), json.dumps(KINDS))
    return results([process])[0].found


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_on_a_mesh_are_bit_for_bit_those_of_one_device(kind, mesh, sharded):
    found = sharded[f"{kind} {mesh}"]
    assert found["different"] == []
    assert found["misplaced"] == []
    assert found["error"] < 1e-5
    kernels, scales = (
        {name.split("/")[-2] for name in found["whole"] if name.endswith(f"_proj/{part}")}
        for part in ("kernel", "scale")
    )
    # Two heads, as ever, and scales: those of outputs that are not split, and those of 256 inputs
    # in two groups or four and of 224 in seven, which eight devices can't divide.
    assert kernels == ({"k_proj", "v_proj"} if mesh == "tensor=8" else set())
    unsplit = {
        "fsdp=8": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        "tensor=8": {"k_proj", "v_proj", "o_proj", "down_proj"},
        "data=2,fsdp=2,tensor=2": set(),
    }[mesh]
    assert scales == (unsplit if kind == "int8" else unsplit - {"o_proj"})


def test_a_host_never_holds_the_kernel_in_float32(tmp_path):
    """Kernels of 403 MB are a hole in a file, and become 101 MB."""
    config = mj.MllamaTextConfig(
        **SHARDED
        | {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 1}
        | {"cross_attention_layers": []}
    )
    config.save_pretrained(tmp_path)
    header, end = {}, 0
    for tensor in tensors(config, "text_model"):
        begin, end = end, end + 4 * math.prod(tensor.hub_shape)
        entry = {"dtype": "F32", "shape": tensor.hub_shape, "data_offsets": [begin, end]}
        header[tensor.saved] = entry
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    [(found, _)] = results([start("quantised_memory.py", 1, tmp_path)])
    assert found["held"] < 0.3 * end
    assert found["grown"] < 0.6 * end


# What comes out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_with_the_weights_that_are_meant(kind, loaded, meant):
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    reference = MllamaForConditionalGeneration.from_pretrained(
        meant[kind], attn_implementation="eager"
    )
    inputs = batch()
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(x) for name, x in inputs.items()}).logits.numpy()
    found = np.asarray(logits(*loaded[kind], inputs))
    attended = inputs["attention_mask"] == 1
    worst = np.abs(found - expected)[attended].max()
    assert worst < 2e-5 * np.abs(expected).max()
    # The unquantised weights' logits are far from both.
    other = np.asarray(logits(*loaded["float32"], inputs))
    assert np.abs(other - expected)[attended].max() > 50 * worst


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_is_that_of_the_weights_that_are_meant(kind, loaded, meant):
    inputs = batch()
    _, params = mj.MllamaForConditionalGeneration.from_pretrained(meant[kind])
    plain = (loaded["float32"][0], params)
    found, expected = (
        model.generate(params, **inputs, do_sample=False, max_new_tokens=8).sequences
        for model, params in (loaded[kind], plain)
    )
    np.testing.assert_array_equal(found, expected)


def test_the_engine_answers_as_generate_does():
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(MODEL, quantise="int8")
    sources = PictureSources((EXAMPLE / "demo" / "pictures",))
    engine = Engine(model, params, PROCESSOR, options=OPTIONS, sources=sources)
    requests = [ask(str(i), "Which digit is this?", i, max_tokens=6) for i in range(5)]
    found = answers(engine, requests)
    for request in requests:
        inputs = PROCESSOR.apply_chat_template(
            whole_messages(request),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        alone = model.generate(params, **inputs, do_sample=False, max_new_tokens=6)
        assert tokens(found[request.custom_id]) == tuple(alone.new_tokens[0].tolist())


def test_the_report_of_the_example_model(loaded):
    inputs = batch()
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[labels >= 395] = -100  # the image token is no part of the vocabulary
    given = [{**inputs, "labels": labels}]
    found = {kind: compare(*loaded["float32"], *loaded[kind], given) for kind in KINDS}
    assert found["int8"].tokens == (labels[:, 1:] != -100).sum()
    assert 0 < found["int8"].mean_kl < 1e-2 < found["nf4"].mean_kl < found["int4"].mean_kl
    assert found["int8"].mean_kl < found["int8"].max_kl
    assert found["int8"].top1_agreement > 0.95
    # The definition, in float64.
    both = [
        np.asarray(logits(*loaded[kind], inputs), float)[:, :-1] for kind in ("float32", "int4")
    ]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in both)
    counted = labels[:, 1:] != -100
    kl = (np.exp(p) * (p - q)).sum(-1)[counted]
    assert found["int4"].mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found["int4"].max_kl == pytest.approx(kl.max(), rel=1e-3)
    chosen = np.take_along_axis(q, np.maximum(labels[:, 1:, None], 0), -1)[..., 0][counted]
    assert found["int4"].quantised_perplexity == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "ratios"), [("int8", (35, 50)), ("int4", (14, 24)), ("nf4", (15, 25))]
)
def test_errors_of_the_weights(kind, ratios, loaded):
    found = weight_errors(LOADED[1], loaded[kind][1])
    assert len(found) == 3 * 7
    assert all(ratios[0] < ratio < ratios[1] for layers in found.values() for ratio in layers)
    stored = arrays(MODEL)["language_model.model.layers.4.cross_attn.o_proj.weight"]
    noise = stored - defined(stored, kind, GROUPS["o"])[1]
    expected = 10 * np.log10(np.square(stored, dtype=float).sum() / np.square(noise).sum())
    layers = found["language_model/model/layers/block_1/cross_attn/o_proj/kernel"]
    assert layers[1] == pytest.approx(expected, abs=0.01)


# Errors -----------------------------------------------------------------------------------------


def test_what_can_not_be_quantised_is_refused_by_name(tmp_path):
    config = mj.MllamaTextConfig(**SHARDED | {"intermediate_size": 228})
    model = mj.MllamaForCausalLM(config)
    model.save_pretrained(random_params(model), tmp_path)
    with pytest.raises(ValueError, match=r"divides 228; use int8") as caught:
        mj.MllamaForCausalLM.from_pretrained(tmp_path, quantise="int4")
    assert re.findall(r"(block_\d+/\S+):", str(caught.value)) == [
        f"block_{i}/mlp/down_proj/kernel" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"layers/block_0/mlp/down_proj/kernel: .* 228"):
        model.clone(quantise="int4").param_shapes()
    with pytest.raises(ValueError, match=r"quantise='int3': expected one of int8, int4, nf4"):
        model.clone(quantise="int3")
    with pytest.raises(ValueError, match="MllamaVisionModel has no decoder layers"):
        mj.MllamaVisionModel.from_pretrained(MODEL, quantise="int8")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    stored = arrays(MODEL)
    stored[name] = stored[name].copy()
    stored[name][3, 4] = np.inf
    save_tensors(stored, MODEL, tmp_path / "infinite")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: .*not finite"):
        mj.MllamaForCausalLM.from_pretrained(tmp_path / "infinite", quantise="int8")


def test_quantised_parameters_are_for_inference(loaded, tmp_path):
    model, params = loaded["int8"]
    with pytest.raises(ValueError, match="save the unquantised ones"):
        model.save_pretrained(params, tmp_path / "saved")
    with pytest.raises(ValueError, match="only loaded, with from_pretrained"):
        model.init_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"q_proj/kernel is int8: .* quantise='int8'"):
        LOADED[0].apply({"params": params}, input_ids=jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"kernel is float32, of a .* quantise='int8' it is int8"):
        model.apply({"params": LOADED[1]}, input_ids=jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"kernel is uint4, of .* quantise='int4' it is int4:"):
        model.clone(quantise="int4").apply(
            {"params": loaded["nf4"][1]}, input_ids=jnp.ones((1, 2), jnp.int32)
        )
    adapters = init_adapters(model, lora_recipe("*/q_proj"), jax.random.key(0))
    with pytest.raises(ValueError, match=r"kernel is quantised \(int8\)"):
        merged(params, adapters, LoraConfig())
    with pytest.raises(ValueError, match=r"stores .*self_attention in few bits, which can't be"):
        start_training(model, params, Recipe(1, trained=TrainedConfig("all")), 0)


def lora_recipe(target: str) -> Recipe:
    return Recipe(1, trained=TrainedConfig("lora"), lora=LoraConfig(rank=2, targets=(target,)))


def test_adapters_are_added_to_quantised_maps(loaded, meant):
    """As they are to the weights that the integers stand for."""
    random = np.random.default_rng(0)
    adapters = init_adapters(LOADED[0], lora_recipe("*o_proj"), jax.random.key(0))
    adapters = jax.tree.map(lambda x: random.normal(size=x.shape, scale=0.1), adapters)
    model, params = loaded["int8"]
    _, unquantised = mj.MllamaForConditionalGeneration.from_pretrained(meant["int8"])
    inputs = {"input_ids": jnp.arange(3, 12)[None]}
    found = logits(model, joined(params, adapters), inputs)
    expected = logits(loaded["float32"][0], joined(unquantised, adapters), inputs)
    without = logits(model, params, inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(found - without).max() > 0.1


def test_plans_count_bits():
    job = Job(task="decode", remat="none", attention="xla", quantise="int4")
    mesh = parse_mesh("tensor=1", jax.devices()[:1])
    tree = placed_params(make_model(job, LOADED[0].config, mesh))["language_model"]["model"]
    found = tree["layers"]["block_2"]["mlp"]["down_proj"]
    assert bytes_a_device(found["kernel"]) == 2 * 192 * 96 // 2
    assert bytes_a_device(found) == 2 * 192 * 96 // 2 + 4 * 2 * (192 // 64) * 96
    with pytest.raises(ValueError, match="quantise='int4': quantised weights are not trained"):
        Job(task="lora", quantise="int4")


def test_the_command(monkeypatch, capsys):
    asked = ["--prompt", "Which digit is this?", "--image", str(PICTURES[0])]
    words = ["mllama-jax", "generate", "--model", str(MODEL), *asked]
    words += ["--quantise", "int8", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    said = capsys.readouterr()
    assert said.out.startswith("It is a")
    assert "decoder weights int8" in said.err
