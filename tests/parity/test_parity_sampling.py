"""Our filters against transformers' logits warpers, on logits with many ties."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from mllama_jax.generation.sampling import apply_min_p, apply_temperature, apply_top_k, apply_top_p

ROWS, VOCABULARY = 6, 211


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Rounded, so that ties are frequent; a third of the rows has tokens ruled out already."""
    random = np.random.default_rng(0)
    values = np.round(3 * random.normal(size=(ROWS, VOCABULARY)), 1).astype(np.float32)
    values[::3, random.integers(VOCABULARY, size=40)] = -np.inf
    return values


def reference(warper: object, logits: np.ndarray) -> np.ndarray:
    return warper(None, torch.from_numpy(logits.copy())).numpy()  # type: ignore[operator]


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(logits: np.ndarray, temperature: float):
    ours = apply_temperature(jnp.asarray(logits), jnp.full(ROWS, temperature))
    warper = logits_process.TemperatureLogitsWarper(temperature)
    np.testing.assert_allclose(ours, reference(warper, logits), rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 17, VOCABULARY, VOCABULARY + 5])
def test_top_k(logits: np.ndarray, top_k: int):
    ours = apply_top_k(jnp.asarray(logits), jnp.full(ROWS, top_k))
    np.testing.assert_array_equal(ours, reference(logits_process.TopKLogitsWarper(top_k), logits))


@pytest.mark.parametrize("top_p", [0.03, 0.31, 0.66, 0.95, 0.999])
def test_top_p(logits: np.ndarray, top_p: float):
    """torch.sort leaves the order of equals open: there, the number that stay is compared."""
    ours = np.asarray(apply_top_p(jnp.asarray(logits), jnp.full(ROWS, top_p)))
    theirs = reference(logits_process.TopPLogitsWarper(top_p), logits)
    for our_row, their_row in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.sort(our_row), np.sort(their_row))


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
def test_min_p(logits: np.ndarray, min_p: float):
    ours = apply_min_p(jnp.asarray(logits), jnp.full(ROWS, min_p))
    np.testing.assert_array_equal(ours, reference(logits_process.MinPLogitsWarper(min_p), logits))
