"""How cuDNN's attention is put together, with the same calls computed by XLA; and its refusals."""

from functools import partial

import jax.numpy as jnp
import pytest
from attention_cases import assert_like_reference, make_cases

from mllama_jax.attention import attend
from mllama_jax.attention.cudnn import attend_composed

CASES = make_cases()


@pytest.mark.parametrize("name", CASES)
def test_composition(name: str):
    assert_like_reference(CASES[name], partial(attend_composed, implementation="xla"))


def test_needs_a_gpu():
    q = jnp.ones((1, 128, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="attention='cudnn' runs on gpu, the device is a cpu"):
        attend(q, q, q, None, "cudnn")
