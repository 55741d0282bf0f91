"""Splash kernels, run by the interpreter, against the reference; and compiled for real TPUs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_like_reference, make_cases
from processes import cpu_devices
from tiny_model import CONFIG, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.attention import attend
from mllama_jax.attention.blocks import choose_blocks
from mllama_jax.attention.costs import splash_cost
from mllama_jax.attention.splash import attend_splash
from mllama_jax.masks import CausalMask, KeysOfTiles, TileMask

TESTS = Path(__file__).parent
CASES = make_cases()


def interpreted(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return attend(q, k, v, mask, "splash_interpret")


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name: str):
    assert_like_reference(CASES[name], interpreted)


@pytest.mark.parametrize(("seed", "images", "tiles"), [(1, 1, 4), (2, 8, 4)])
def test_other_numbers_of_images(seed: int, images: int, tiles: int):
    assert_like_reference(make_cases(seed, images, tiles)["tiles"], interpreted)


@pytest.mark.parametrize("name", ["vision", "tiles"])
def test_in_bfloat16(name: str):
    assert_like_reference(CASES[name], interpreted, jnp.bfloat16)


def test_separate_backward_kernel(monkeypatch: pytest.MonkeyPatch):
    """So many blocks of keys that the queries' gradient is computed by a kernel of its own."""
    monkeypatch.setattr("mllama_jax.attention.blocks._MOST_KEYS", {2: 128, 4: 128})
    case = CASES["tiles"]
    assert not choose_blocks(case.T, case.S, 4).fused_backward
    assert_like_reference(case, interpreted)


def test_start_that_only_the_run_knows():
    """A prompt's later part: slots are traced, and blocks behind the last one are skipped."""
    T, S = 130, 1400
    q, k = jnp.ones((1, T, 2, 8)), jnp.asarray(np.random.default_rng(0).normal(size=(1, S, 2, 8)))
    valid = jnp.ones((1, S), bool)

    @jax.jit
    def run(start: jax.Array) -> jax.Array:
        return attend(q, k, k, CausalMask(start + jnp.arange(T), valid), "splash_interpret")

    for start in (0, 700, S - T):
        mask = CausalMask(start + jnp.arange(T), valid)
        expected = attend(q, k, k, mask, "reference")
        np.testing.assert_allclose(run(jnp.int32(start)), expected, atol=1e-6)


def test_skipped_blocks_are_not_read():
    """Keys of a tile that no query uses may be anything; so may slots that come later."""
    q = jnp.ones((1, 128, 1, 8))
    k = jnp.ones((1, 1024, 1, 8)).at[:, 512:].set(jnp.nan)
    tiles = jnp.zeros((1, 128, 2), bool).at[:, :, 0].set(True)
    for mask in (TileMask(tiles, 512), CausalMask(jnp.arange(128), jnp.ones((1, 1024), bool))):
        assert jnp.isfinite(interpreted(q, k, k, mask)).all()


def test_whole_model():
    """Text and images long enough for the kernels, in both towers."""
    vision = dataclasses.replace(CONFIG.vision_config, image_size=32)
    model = mj.MllamaForConditionalGeneration(dataclasses.replace(CONFIG, vision_config=vision))
    params = random_params(model)
    inputs = make_inputs([[(3, 1), (50, 2)], [(0, 3)]], lengths=[130, 140])
    inputs["pixel_values"] = np.random.default_rng(0).normal(size=(2, 2, 3, 3, 32, 32))

    def run(kind: Any) -> Any:
        return jax.jit(model.clone(attention=kind).apply)({"params": params}, **inputs).logits

    np.testing.assert_allclose(run("splash_interpret"), run("reference"), atol=1e-4)


def pallas_calls(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from pallas_calls(inner)


def test_tile_rule_at_full_size():
    """Every key of the most tiles, and padding behind them."""
    P = 1601
    rule = KeysOfTiles(32, P)
    tiles = jnp.asarray(np.random.default_rng(0).random((1, 8, 32)) < 0.5).at[:, :, 31].set(True)
    mask = TileMask(tiles, P)
    keys = jnp.arange(32 * P + 500)
    allowed = rule(mask.codes()[0, :, None], keys)
    np.testing.assert_array_equal(allowed[:, : 32 * P], mask.rows(0, 8)[0])
    assert not allowed[:, 32 * P :].any()
    assert mask.rule == rule
    assert hash(mask.rule) == hash(rule)


def test_too_many_tiles():
    q, k = jnp.ones((1, 128, 1, 8)), jnp.ones((1, 33, 1, 8))
    mask = TileMask(jnp.ones((1, 128, 33), bool), 1)
    with pytest.raises(ValueError, match=r"33 tile slots.* up to 32: use fewer images"):
        attend_splash(q, k, k, mask, interpret=True)


def test_needs_a_tpu():
    q = jnp.ones((1, 128, 1, 8))
    message = "attention='splash' runs on tpu, the device is a cpu: choose"
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, None, "splash")
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, None, "splash", mesh)


def test_blocks_cover_the_lengths():
    for T in (128, 129, 700, 2048, 6432, 33000):
        for S in (1, 128, 404, 6404, 6432, 51232, 131072):
            for options in ({}, {"causal": True}, {"keys_skipped_together": 1601}):
                for itemsize in (2, 4):
                    blocks = choose_blocks(T, S, itemsize, **options)
                    assert T <= blocks.num_queries < T + blocks.queries
                    assert S <= blocks.num_keys < S + blocks.keys
                    assert blocks.num_queries % blocks.queries == 0
                    assert blocks.num_keys % blocks.keys == 0
                    assert blocks.keys % blocks.keys_at_once == 0
                    assert blocks.queries % 128 == blocks.keys_at_once % 128 == 0
                    assert not blocks.fused_backward or blocks.num_keys <= 4 * blocks.keys


@pytest.mark.parametrize("S", [600, 33000])
def test_cost_is_what_the_kernels_compute(S: int):
    """Products and exponentials counted in the kernels themselves, times their grids."""
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 128), jnp.bfloat16) for n in (600, S))

    def run(q: Any, k: Any, v: Any) -> Any:
        return attend_splash(q, k, v, None, interpret=True).sum()

    flops = exponentials = 0
    jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(q, k, k).jaxpr
    for call in pallas_calls(jaxpr):
        steps = np.prod(call.params["grid_mapping"].grid)
        for equation in equations(call.params["jaxpr"]):
            size = equation.outvars[0].aval.size if equation.outvars else 0
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                depth = equation.invars[0].aval.shape[contracted[0]]
                flops += 2 * steps * size * depth
            elif equation.primitive.name == "exp" and equation.outvars[0].aval.shape[1] != 128:
                exponentials += steps * size
    cost = splash_cost(1, 600, S, 2, 128, backward=True)
    assert (cost.flops, cost.exponentials) == (flops, exponentials)


def equations(jaxpr: Any) -> Any:
    """All of them, those of an unrolled loop as often as it runs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            for _ in range(equation.params.get("length", 1)):
                yield from equations(inner)


def test_cost_of_causal_attention():
    """Ten of sixteen blocks at this length; half the work at any."""
    whole = splash_cost(1, 2048, 2048, 1, 128, backward=False)
    causal = splash_cost(1, 2048, 2048, 1, 128, backward=False, causal=True)
    assert causal.exponentials == whole.exponentials * 10 / 16
    assert splash_cost(3, 2048, 2048, 5, 80, backward=False).flops == 15 * whole.flops


def run_in_process(task: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, TESTS / "splash_devices.py", task],
        env={**os.environ, **environment},
        cwd=TESTS,
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_on_meshes():
    run_in_process("meshes", **cpu_devices(8))


def test_compiles_for_tpus_without_a_score_matrix():
    """Forward and backward, for three generations; at full length nothing is as large as scores."""
    found = json.loads(
        run_in_process(
            "compile",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-8",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_WORKER_ID="0",
            ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        ).splitlines()[-1]
    )
    # A forward and a backward kernel for each of three masks.
    assert found["v5e"] == found["v6e"] == found["v5p"] == 6
    # The forward kernel runs again where its named results are not kept, and only there.
    assert found["result kept"] == 2
    assert found["nothing kept"] == 3
    # Scores of one head in bfloat16 are 79 MiB (vision) and 25 MiB (cross-attention).
    assert found["temporary"] < 48 * 2**20
