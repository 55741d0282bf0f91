"""How cuDNN's attention is put together, with the same calls computed by XLA; and its refusals."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest
from attention_cases import assert_like_reference, inputs, make_cases

from mllama_jax import MllamaForConditionalGeneration
from mllama_jax.attention import attend
from mllama_jax.attention.columns import with_padding_columns
from mllama_jax.attention.cudnn import attend_composed

CASES = make_cases()
FLOAT32: Any = {"precision": "float32", "preferred_element_type": jnp.float32}


@pytest.mark.parametrize("name", CASES)
def test_composition(name: str):
    assert_like_reference(CASES[name], partial(attend_composed, implementation="xla"))


@pytest.mark.parametrize("name", ["vision", "counted"])
def test_in_bfloat16(name: str):
    assert_like_reference(CASES[name], partial(attend_composed, implementation="xla"), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_padding_is_hidden_in_every_dtype(dtype: Any):
    """By a feature that is finite in each of them and changes no other score."""
    mask = CASES["vision"].mask
    q, k = (x.astype(dtype) for x in inputs(CASES["vision"])[:2])
    wide_q, wide_k = with_padding_columns(q, k, mask, 1.0)
    added = jnp.einsum("BENH,BFNH->BNEF", wide_q[..., 80:], wide_k[..., 80:], **FLOAT32)
    hidden = mask.padding_BE[:, None, :, None] & mask.padding_BE[:, None, None, :]
    assert (added[jnp.broadcast_to(hidden, added.shape)] < -1e6).all()
    assert (added[jnp.broadcast_to(~hidden, added.shape)] == 0).all()


def test_needs_a_gpu():
    q = jnp.ones((1, 128, 1, 8), jnp.bfloat16)
    message = "attention='cudnn' runs on gpu, the device is a cpu"
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, None, "cudnn")
    with pytest.raises(ValueError, match=message):  # before anything is read
        MllamaForConditionalGeneration.from_pretrained("nowhere", attention="cudnn")
