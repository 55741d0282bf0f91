"""Products with weights: the value and gradients of JAX's own product."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.products import weight_product


def random(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def with_gradients(product: Any, *given: Any) -> Any:
    def loss(x: Any, weights: Any) -> Any:
        result = product(x, weights)
        return jnp.sin(result).sum(), result

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*given)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        *(found, expected),
    )


@pytest.mark.parametrize(
    ("x", "weights", "contract"),
    [((5, 8), (8, 3), 1), ((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 7), 2)],
)
def test_value_and_gradients(x: Any, weights: Any, contract: int) -> None:
    given = random(*x), random(*weights)
    found = with_gradients(partial(weight_product, contract=contract), *given)
    assert_close(found, with_gradients(partial(jnp.tensordot, axes=contract), *given), 1e-5)


def test_result_of_its_own_dtype() -> None:
    given = [jnp.asarray(random(*shape), jnp.bfloat16) for shape in ((2, 5, 8), (8, 3))]
    plain = partial(jnp.tensordot, axes=1, preferred_element_type=jnp.float32)
    found = with_gradients(partial(weight_product, dtype=jnp.float32), *given)
    (_, result), gradients = found
    assert result.dtype == jnp.float32
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
    assert_close(found, with_gradients(plain, *given), 0.01)


@pytest.mark.parametrize("learned", [0, 1])
def test_keeps_only_what_its_gradients_need(learned: int) -> None:
    """Of frozen weights no input is kept for the backward pass."""
    given = [random(64, 8), random(8, 3)]

    def product(x: Any) -> Any:
        return weight_product(*([x, given[1]] if learned == 0 else [given[0], x]))

    _, backward = jax.vjp(product, given[learned])
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.ndim == 2]
    assert kept == [given[1 - learned].shape]
