"""One new token over a cache, in every kind, against the textbook formula."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import cpu_devices
from tiny_model import CONFIG, make_inputs, random_params

import mllama_jax as mj
from mllama_jax.attention import attend_with_weights, decode, decode_kernel, decode_rows
from mllama_jax.attention.decode import attend_decode
from mllama_jax.cache import MllamaCache
from mllama_jax.masks import CausalMask
from mllama_jax.sharding import parse_mesh

LAYERS, H = 3, 16


def case(seed: int, B: int, N: int, K: int, S: int) -> tuple[Any, ...]:
    """Random queries, cache and masks; slots that are not in use hold NaN."""
    random = np.random.default_rng(seed)
    used = random.integers(0, S + 1, B).astype(np.int32)
    used[-1] = S
    q = random.normal(size=(B, N, H))
    keys, values = random.normal(size=(2, LAYERS, B, K, S, H))
    for sample, length in enumerate(used):
        keys[:, sample, :, length:] = np.nan
    new = random.normal(size=(2, B, K, 1, H))
    allowed = random.random((B, S)) < 0.6
    allowed[0] = False
    floats = [jnp.asarray(x, jnp.float32) for x in (q, keys, values, *new)]
    return (*floats, jnp.asarray(allowed), used)


def expected(
    q: Any, keys: Any, values: Any, new_k: Any, new_v: Any, allowed: Any, used: Any, with_new: bool
) -> Any:
    """For layer 1, sample by sample."""
    rows = []
    for sample, length in enumerate(used.tolist()):
        k, v = (x[1, sample : sample + 1, :, :length] for x in (keys, values))
        valid = allowed[sample : sample + 1, :length]
        if with_new:
            news = (x[sample : sample + 1] for x in (new_k, new_v))
            k, v = (jnp.concatenate(pair, 2) for pair in zip((k, v), news, strict=True))
            valid = jnp.pad(valid, ((0, 0), (0, 1)), constant_values=True)
        if not valid.size:
            rows.append(jnp.zeros_like(q[:1]))
            continue
        mask = CausalMask(jnp.asarray([k.shape[2]]), valid)
        query = q[sample : sample + 1, None]
        out, _ = attend_with_weights(query, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        rows.append(out[:, 0])
    return jnp.concatenate(rows)


def ours(
    q: Any, keys: Any, values: Any, new_k: Any, new_v: Any, allowed: Any, used: Any, with_new: bool,
    kind: str = "splash_interpret", mesh: Any = None,
) -> Any:  # fmt: skip
    return jax.jit(attend_decode, static_argnames=("kind", "mesh"))(
        q,
        keys,
        jnp.where(jnp.isnan(values), 0, values),
        jnp.int32(1),
        allowed.astype(jnp.int32)[:, None],
        jnp.asarray(used),
        (new_k, new_v) if with_new else None,
        kind=kind,
        mesh=mesh,
    )


@pytest.mark.parametrize(
    ("N", "K", "S", "with_new"), [(6, 2, 24, True), (4, 4, 13, False), (4, 1, 8, True)]
)
@pytest.mark.parametrize(
    ("kind", "gain"), [("xla", 0.0), ("xla", 100.0), ("splash_interpret", 1.0)]
)
def test_equals_the_reference(
    monkeypatch, kind: str, gain: float, N: int, K: int, S: int, with_new: bool
):
    """On CPUs four samples one by one, and two at a time."""
    monkeypatch.setattr(decode_kernel, "_BLOCK", 8)
    monkeypatch.setattr(decode_rows, "_BLOCK", 8)
    monkeypatch.setattr(decode_rows, "_GAIN", gain)
    jax.clear_caches()
    for seed in range(3):
        arguments = (*case(seed, 4, N, K, S), with_new)
        two = 2 * arguments[1][0, 0, :, :8].nbytes
        monkeypatch.setattr(decode_rows, "_BYTES_AT_ONCE", two)
        found = ours(*arguments, kind=kind)
        np.testing.assert_allclose(found, expected(*arguments), atol=2e-6)
        if not with_new:
            np.testing.assert_array_equal(found[0], 0)  # may attend to nothing


def test_wrong_devices_are_refused():
    arguments = case(0, 2, 4, 2, 8)
    with pytest.raises(ValueError, match="attention='splash' runs on tpu, the device is a cpu"):
        attend_decode(
            *arguments[:3],
            jnp.int32(1),
            jnp.ones((2, 1, 8), jnp.int32),
            jnp.int32(8),
            None,
            "splash",
        )


def test_plain_operations_for_other_devices():
    """What is not lowered for a CPU, which this is."""
    for with_new in (True, False):
        *arguments, used = case(3, 3, 6, 2, 24)
        q, keys, values, *new, allowed = arguments
        scalars = (jnp.asarray([1]), jnp.asarray(used), jnp.asarray([0]))
        slots = jnp.where(jnp.arange(24) < used[:, None], allowed, False).astype(jnp.int32)
        # The token's own slot, where there is one.
        slots = slots.at[jnp.arange(3), used].set(1, mode="drop") if with_new else slots
        found = decode._attend_layer(
            2,
            scalars,
            q,
            *(jnp.where(jnp.isnan(x), 0, x) for x in (keys, values)),
            slots[:, None],
            tuple(new) if with_new else None,
        )
        rows = used < 24 if with_new else slice(None)
        wanted = expected(*arguments, used, with_new)
        np.testing.assert_allclose(found[rows], wanted[rows], atol=2e-6)


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
    environment = os.environ | cpu_devices(8)
    subprocess.run([sys.executable, Path(__file__)], env=environment, check=True, timeout=120)


def assert_written_in_place(written: str) -> None:
    """Each device writes its own part of the cache; nothing is gathered for it."""
    mesh = parse_mesh(written)
    split = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))
    keys, new = (
        jax.device_put(np.random.default_rng(0).normal(size=(LAYERS, 4, 2, S, H)), split)
        for S in (40, 1)
    )
    length = jnp.zeros((), jnp.int32)
    cache = MllamaCache(keys, keys, None, None, length)
    for start in (jnp.int32(7), jnp.arange(4)):
        append = jax.jit(lambda cache, start: cache.append(start, new, new, mesh))
        assert "all-gather" not in append.lower(cache, start).compile().as_text()
        found = np.array(append(cache, start).keys)
        expected = np.array(keys)
        for sample, slot in enumerate(np.broadcast_to(start, 4)):
            expected[:, sample, :, slot] = np.asarray(new)[:, sample, :, 0]
        np.testing.assert_array_equal(found, expected)


if __name__ == "__main__":
    assert_written_in_place("data=2,fsdp=2,tensor=2")
    for written in ("data=2,fsdp=2,tensor=2", "tensor=8", "data=8"):
        arguments = case(1, 4, 8, 2, 40)
        for with_new in (True, False):
            wanted = expected(*arguments, with_new)
            for kind in ("xla", "splash_interpret"):
                found = ours(*arguments, with_new, kind=kind, mesh=parse_mesh(written))
                np.testing.assert_allclose(found, wanted, atol=2e-6)
