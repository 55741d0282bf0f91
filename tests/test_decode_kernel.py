"""The kernel of one new token, operation by operation, against the textbook formula."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.attention import attend_with_weights, decode_kernel
from mllama_jax.attention.decode_kernel import attend_decode
from mllama_jax.masks import CausalMask
from mllama_jax.sharding import parse_mesh

LAYERS, H = 3, 16


def case(seed: int, B: int, N: int, K: int, S: int) -> tuple[Any, ...]:
    """Random queries, cache and masks; slots that are not in use hold NaN."""
    random = np.random.default_rng(seed)
    used = int(random.integers(1, S + 1))
    q = random.normal(size=(B, N, H))
    keys, values = random.normal(size=(2, LAYERS, B, K, S, H))
    keys[..., used:, :] = np.nan
    new = random.normal(size=(2, B, K, 1, H))
    allowed = random.random((B, S)) < 0.6
    allowed[0] = False
    floats = [jnp.asarray(x, jnp.float32) for x in (q, keys, values, *new)]
    return (*floats, jnp.asarray(allowed), used)


def expected(
    q: Any, keys: Any, values: Any, new_k: Any, new_v: Any, allowed: Any, used: int, with_new: bool
) -> Any:
    """For layer 1."""
    k, v = (x[1, :, :, :used] for x in (keys, values))
    allowed = allowed[:, :used]
    if with_new:
        k, v = (jnp.concatenate(pair, 2) for pair in ((k, new_k), (v, new_v)))
        allowed = jnp.pad(allowed, ((0, 0), (0, 1)), constant_values=True)

    mask = CausalMask(jnp.asarray([k.shape[2]]), allowed)
    out, _ = attend_with_weights(q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return out[:, 0]


def ours(
    q: Any, keys: Any, values: Any, new_k: Any, new_v: Any, allowed: Any, used: int, with_new: bool,
    mesh: Any = None,
) -> Any:  # fmt: skip
    return jax.jit(attend_decode, static_argnames=("mesh", "interpret"))(
        q,
        keys,
        jnp.where(jnp.isnan(values), 0, values),
        jnp.int32(1),
        allowed.astype(jnp.int32)[:, None],
        jnp.int32(used),
        (new_k, new_v) if with_new else None,
        mesh=mesh,
        interpret=True,
    )


@pytest.mark.parametrize("with_new", [True, False])
@pytest.mark.parametrize(("N", "K", "S"), [(6, 2, 24), (4, 4, 13), (4, 1, 8)])
def test_equals_the_reference(monkeypatch, N: int, K: int, S: int, with_new: bool):
    monkeypatch.setattr(decode_kernel, "_BLOCK", 8)
    jax.clear_caches()
    for seed in range(3):
        arguments = (*case(seed, 3, N, K, S), with_new)
        found = ours(*arguments)
        np.testing.assert_allclose(found, expected(*arguments), atol=2e-6)
        if not with_new:
            np.testing.assert_array_equal(found[0], 0)  # may attend to nothing


def test_wrong_devices_are_refused():
    arguments = case(0, 2, 4, 2, 8)
    with pytest.raises(ValueError, match="attention='splash' runs on tpu, the device is a cpu"):
        attend_decode(
            *arguments[:3], jnp.int32(1), jnp.ones((2, 1, 8), jnp.int32), jnp.int32(8), None
        )


def test_generated_tokens_are_those_of_xla():
    model = mj.MllamaForConditionalGeneration(CONFIG)
    params = random_params(model)
    inputs = make_inputs([[(1, 3), (4, 2)], [(0, 1)], []], [8, 5, 7])
    texts = [
        model.clone(attention=kind).generate(
            params, **inputs, max_new_tokens=9, eos_token_id=None, pad_token_id=0
        )
        for kind in ("xla", "splash_interpret")
    ]
    np.testing.assert_array_equal(texts[0].sequences, texts[1].sequences)


def test_on_meshes():
    """Among them one with fewer key/value heads than devices along tensor."""
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        [sys.executable, Path(__file__)], env=os.environ | devices, check=True, timeout=120
    )


if __name__ == "__main__":
    for written in ("data=2,fsdp=2,tensor=2", "tensor=8", "data=8"):
        arguments = case(1, 4, 8, 2, 40)
        for with_new in (True, False):
            found = ours(*arguments, with_new, mesh=parse_mesh(written))
            np.testing.assert_allclose(found, expected(*arguments, with_new), atol=2e-6)
